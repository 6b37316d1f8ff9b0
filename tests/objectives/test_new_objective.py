"""An objective of one's own: one module, which no list elsewhere has to name."""

import pytest

from kd_jax import keys, objectives
from kd_jax.errors import UserError
from kd_jax.recipes import distil, plan
from kd_jax.recipes.compare import compare
from kd_jax.run import workdir
from kd_jax.run.run import build
from kd_jax.train import records
from tests import tiny_config
from tests.plugged import plug_in
from tests.recipes import substituting

MODULE = '''
"""`hellinger`: squared Hellinger distance of teacher and student."""

import dataclasses

import jax.numpy as jnp

from kd_jax.objectives.divergence import Softened
from kd_jax.ranges import Real


@dataclasses.dataclass(frozen=True)
class Hellinger(Softened):
    """T^2 size (1 - sum_v sqrt(p q)), p = softmax(student / T), q = softmax(teacher / T)."""

    size: float = 1.0

    def value(self, rows, sums, temperature):
        p_CV, q_CV = (each.probs(temperature, sums) for each in (rows.student, rows.teacher))
        overlap_C1 = jnp.sum(jnp.sqrt(p_CV * q_CV), axis=1, keepdims=True)
        return self.size * self._factor(temperature) * (1.0 - overlap_C1)


def make(t_squared=True, size=1.0):
    Real(above=0).check(size, "objective hellinger: size")
    return Hellinger(t_squared, size)
'''


@pytest.fixture
def term(tmp_path, monkeypatch):
    """kd_jax/objectives/hellinger.py, in another folder."""
    plug_in(monkeypatch, tmp_path, objectives, "hellinger", MODULE)


@pytest.fixture
def config(tmp_path):
    c = tiny_config.get_config(str(tiny_config.write_text(tmp_path)))
    c.objective = dict(ce=dict(weight=1.0), hellinger=dict(weight=2.0, temperature=2.0, size=3.0))
    c.data.cache_dir = str(tmp_path)
    return c


def test_it_is_trained_with_compared_and_planned(term, config, tmp_path):
    folder = tmp_path / "run"
    with substituting.quick(), workdir.enter(config, "example", str(folder)) as place:
        results = distil.run(config, place)
        planned = plan.needed(build(config))
    rows = records.read(folder / "student" / "metrics.csv")
    assert len(rows) == results["stages"]["student"]["steps"] == 6
    for row in rows:
        assert 0 < float(row["hellinger"]) < 3 * 2**2
        assert float(row["hellinger_weighted"]) == pytest.approx(2 * float(row["hellinger"]))
    assert planned["stage"] == "student" and planned["params_teacher"] > 0
    compare([str(folder)], str(tmp_path / "report"))
    assert "hellinger" in (tmp_path / "report" / "report.md").read_text()


def test_its_keys_are_set_on_the_command_line(term, config):
    keys.change(config, [("objective.hellinger.t_squared", "false")])
    terms = {term.name: term for term in build(config).principal.program.objective.row_terms}
    assert terms["hellinger"].divergence.t_squared is False
    keys.change(config, [("objective.hellinger.siz", "2")])
    with pytest.raises(UserError, match="objective.hellinger: unknown siz; have .* size"):
        build(config)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("helinger", {}, r"unknown objectives plug-in 'helinger' .did you mean 'hellinger'\?.; h"),
        ("hellinger", dict(siz=2.0), "hellinger: unknown siz; have weight.* t_squared, size"),
        ("hellinger", dict(size=0.0), "objective hellinger: size=0.0 must be above 0"),
    ],
)
def test_mistakes(term, config, name, settings, message):
    config.objective = {name: dict(weight=1.0) | settings}
    with pytest.raises(UserError, match=message):
        build(config)
