"""A kind of stage of one's own: one module, which no list elsewhere has to name."""

import pytest
from etils import epath

from kd_jax import stages, storage
from kd_jax.errors import UserError
from kd_jax.recipes import distil, export, plan
from kd_jax.recipes.compare import compare
from kd_jax.recipes.evaluate import Options, evaluate_stage
from kd_jax.run import workdir
from kd_jax.run.run import build
from tests import tiny_config
from tests.plugged import plug_in
from tests.recipes import substituting

MODULE = '''
"""Trains the teacher again, from parameters that are scaled."""

import jax

from kd_jax.ranges import Real
from kd_jax.run import stage

SETTINGS = dict(scale=Real(above=0, default=1.0))


def make(run, name, settings):
    run.add(name, run.models["teacher"])

    def phases(run, this, parameters):
        def enter(before):
            scaled = jax.tree.map(lambda x: settings.own["scale"] * x, parameters["teacher"])
            return stage.first_state(run, this, scaled)

        return [stage.last_phase(run, this, enter)]

    return stage.make(run, settings, model=name, phases_of=phases)
'''


@pytest.fixture
def kind(tmp_path, monkeypatch):
    """kd_jax/stages/scaled.py, in another folder."""
    plug_in(monkeypatch, tmp_path, stages, "scaled", MODULE)


@pytest.fixture
def config(tmp_path):
    c = tiny_config.get_config(str(tiny_config.write_text(tmp_path)))
    c.steps = 2
    c.stages = dict(teacher={}, again=dict(kind="scaled", scale=0.5))
    c.data.cache_dir = str(tmp_path)
    return c


def test_it_is_run_evaluated_exported_compared_and_planned(kind, config, tmp_path, monkeypatch):
    folder = str(tmp_path / "run")
    with substituting.quick(), workdir.enter(config, "example", folder) as place:
        results = distil.run(config, place)
        found = results["stages"]
        assert list(found) == ["teacher", "again"] and found["again"]["kl"] > 0
        assert storage.read_json(epath.Path(folder) / "again" / "results.json") == found["again"]
        judged = evaluate_stage(folder, "again", None, None, None, Options(precision="fp32")).report
        assert judged["loss"] == pytest.approx(found["again"]["loss"], abs=1e-5)
        planned = plan.needed(build(config))
        assert planned["stage"] == "again"
        assert planned["params_student"] == planned["params_teacher"]
    monkeypatch.setattr(export.export_check, "check", lambda *_: {"kd_jax": 0.0})
    export.export_stage(folder, "again", str(tmp_path / "out"))
    assert "again" in (tmp_path / "out" / "README.md").read_text()
    compare([folder], str(tmp_path / "report"))
    assert "again" in (tmp_path / "report" / "report.md").read_text()


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (dict(kind="scalde"), r"unknown stages plug-in 'scalde' .did you mean 'scaled'\?.; have: "),
        (dict(kind="scaled", scale=0.0), "config.stages.again.scale=0.0 must be above 0"),
        (dict(kind="scaled", scal=1.0), "unknown key config.stages.again.scal .did you mean 'sc"),
        (dict(kind="plain", model="pupil"), "model='pupil': the config has no section 'pupil'"),
        (dict(kind="plain", objective="aim"), "stages.again.objective='aim': not in the config"),
        ({}, "'again'.*: have teacher, baseline, student; of others give the kind"),
    ],
)
def test_mistakes(kind, config, stage, message):
    config.stages = dict(again=stage)
    config.teacher.init = "scratch"
    with pytest.raises(UserError, match=message):
        build(config)
