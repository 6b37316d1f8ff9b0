import contextlib
import dataclasses
import json
import shutil
from unittest import mock

import pytest

from kd_jax import config as defaults
from kd_jax import storage
from kd_jax.errors import Diverged, UserError
from kd_jax.recipes import distil, sweep
from kd_jax.run import workdir
from kd_jax.train import loop
from tests import smoke
from tests.recipes import ensembles, finetuning, substituting

pytestmark = pytest.mark.usefixtures("caches")

WEIGHT, TEMPERATURE = "objective.kl.weight", "objective.kl.temperature"
GRID = ((WEIGHT, (0.3, 3.0)), (TEMPERATURE, (1.0, 4.0)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sweep")


def config(*keys, stage="student", stages=("student",), **changes):
    c = finetuning.config(*stages)
    c.recipe = "sweep"
    c.sweep = defaults.sweep(*keys)
    c.sweep.stage = stage
    c.sweep.update(changes)
    return c


@contextlib.contextmanager
def scored(values):
    """Runs that train nothing: `values(config of the trial)` is its primary figure."""
    ran = []

    def run_stage(run, this, given, answers, split):
        ran.append((this.name, run.config, split))
        (run.folder / this.name / "checkpoints").mkdir(parents=True)
        return {this.name: {"accuracy": values(run.config), "loss": 1.0, "best_step": 2}}

    def held_out(run, this, model, answers, split):
        ran.append((this.name, run.config, f"best on {split}"))
        return {"accuracy": 0.5, "loss": 1.0}

    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (distil, "run_stage", run_stage),
            (sweep.measure, "figures", held_out),
            (sweep.stage, "restore_best", lambda *_: {}),
            (sweep, "stored_logits", lambda *_: None),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        yield ran


def run(config, folder):
    with finetuning.quick(), workdir.enter(config, "example", str(folder)) as place:
        return sweep.run(config, place)


def by_weight(config):
    return 1.0 / config.objective.kl.weight


def kept(folder):
    """Numbers of the trials that still have checkpoints."""
    return [path.parts[-3][:3] for path in sorted(folder.glob("trials/*/student/checkpoints"))]


def test_a_grid_in_order_the_best_on_the_reported_split_once(tmp_path, capsys):
    with scored(by_weight) as ran:
        found = run(config(*GRID), tmp_path)
    pairs = [(0.3, 1.0), (0.3, 4.0), (3.0, 1.0), (3.0, 4.0)]
    assert [tuple(trial["keys"].values()) for trial in found["trials"]] == pairs
    assert [c.objective.kl.weight for _, c, _ in ran[:4]] == [0.3, 0.3, 3.0, 3.0]
    assert [split for *_, split in ran] == ["validation"] * 4 + ["best on test"]
    assert found["best"] == found["trials"][0]  # of two alike, the first
    assert found["stages"]["student"]["accuracy"] == 0.5 and found["split"] == "test"
    assert kept(tmp_path) == ["000"]
    assert (tmp_path / "heat_map.png").stat().st_size > 0
    rows = (tmp_path / "trials.md").read_text().splitlines()
    assert sum(row.startswith("|") for row in rows) == 2 + 4
    assert storage.read_json(tmp_path / "results.json") == found
    assert "best: trial 0" in capsys.readouterr().out
    # The same command again: nothing is left to do.
    with scored(by_weight) as ran:
        again = run(config(*GRID), tmp_path)
    assert not ran and again["trials"] == found["trials"] and kept(tmp_path) == ["000"]


def test_finished_trials_are_skipped(tmp_path):
    def fail_at_third(config):
        if config.objective.kl.weight == 3.0:
            raise KeyboardInterrupt
        return by_weight(config)

    with scored(fail_at_third), pytest.raises(KeyboardInterrupt):
        run(config(*GRID), tmp_path)
    for path in tmp_path.glob("trials/002-*/student"):
        shutil.rmtree(path)
    with scored(lambda config: config.objective.kl.weight) as ran:
        found = run(config(*GRID), tmp_path)
    assert [c.objective.kl.weight for _, c, split in ran if split == "validation"] == [3.0, 3.0]
    assert found["best"]["trial"] == 0 and len(found["trials"]) == 4
    assert kept(tmp_path) == ["000"]


def test_other_processes_write_and_delete_nothing(tmp_path):
    """Several of them raced: renames of a file that another had renamed, checkpoints that another
    was reading."""
    with mock.patch.object(sweep.jax, "process_index", lambda: 1), scored(by_weight):
        found = run(config(*GRID), tmp_path)
    assert len(found["trials"]) == 4 and found["best"]["trial"] == 0
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert kept(tmp_path) == ["000", "001", "002", "003"]


def test_a_trial_that_diverges_is_the_last(tmp_path):
    def diverging(config):
        if config.objective.kl.weight == 0.3:
            raise Diverged("student: loss is nan at step 2")
        return 0.5

    with scored(diverging):
        found = run(config(*GRID), tmp_path)
    assert [bool(trial["figures"]) for trial in found["trials"]] == [False, False, True, True]
    assert found["best"]["trial"] == 2 and (tmp_path / "heat_map.png").exists()
    rows = (tmp_path / "trials.md").read_text().splitlines()
    assert rows[-1].startswith("| 1 |") and " - " in rows[-1]


def test_all_trials_diverge(tmp_path):
    def diverging(config):
        raise Diverged("student: loss is nan at step 2")

    with scored(diverging), pytest.raises(UserError, match="all 4 trials diverged; lower optim"):
        run(config(*GRID), tmp_path)


SPACE = (
    (WEIGHT, dict(low=0.1, high=10.0, log=True)),
    ("batch_size", dict(low=1, high=4)),
    ("optim.schedule.kind", ("linear", "cosine")),
)


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_proposals_are_the_same_after_a_resume(sampler, tmp_path):
    # TPE is random itself for its first ten trials.
    settings = config(*SPACE, sampler=sampler, trials=13)

    def values(config):
        return -abs(config.objective.kl.weight - 2.0)

    def interrupted(config):
        if len(done) == 11:
            raise KeyboardInterrupt
        done.append(1)
        return values(config)

    done = []
    with mock.patch.object(sweep.Run, "changed", _only_config):
        with scored(values):
            whole = run(settings, tmp_path / "whole")["trials"]
        with scored(interrupted), pytest.raises(KeyboardInterrupt):
            run(settings, tmp_path / "resumed")
        for path in (tmp_path / "resumed").glob("trials/011-*"):
            shutil.rmtree(path)
        with scored(values) as ran:
            resumed = run(settings, tmp_path / "resumed")["trials"]
    assert len([split for *_, split in ran if split == "validation"]) == 2
    assert [trial["keys"] for trial in resumed] == [trial["keys"] for trial in whole]
    assert len({json.dumps(trial["keys"]) for trial in whole}) == 13
    for trial in whole:
        assert 0.1 <= trial["keys"][WEIGHT] <= 10.0 and trial["keys"]["batch_size"] in range(1, 5)


def _only_config(run, config, folder):
    """Without the checks, of batch sizes say, that are not of interest here."""
    return dataclasses.replace(run, config=config, folder=folder)


def test_tpe_learns_from_trials(tmp_path):
    chosen = []
    for sign in (1, -1):
        settings = config((WEIGHT, dict(low=0.1, high=10.0)), sampler="tpe", trials=16)
        with scored(lambda config, sign=sign: sign * config.objective.kl.weight):
            trials = run(settings, tmp_path / str(sign))["trials"]
        chosen.append([trial["keys"][WEIGHT] for trial in trials])
    assert chosen[0][:10] == chosen[1][:10] and chosen[0][11:] != chosen[1][11:]
    assert sum(chosen[0][11:]) > sum(chosen[1][11:])


def test_trials_that_change_models_have_a_setup_of_their_own(tmp_path):
    settings = config(("student.architecture.hidden_dropout_prob", (0.0, 0.5)))
    with scored(lambda config: config.student.architecture.hidden_dropout_prob) as ran:
        found = run(settings, tmp_path)
    assert [c.student.architecture.hidden_dropout_prob for _, c, _ in ran] == [0.0, 0.5, 0.5]
    assert found["best"]["trial"] == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(keys=(("objective.kl.wieght", (1.0,)),)), r"objective\.kl\.wieght is not in the c.*"),
        (dict(keys=(("objective.jsd.weight", (1.0,)),)), "not in the config; there: nothing"),
        (dict(keys=()), "config.sweep.keys is empty"),
        (dict(keys=((WEIGHT, ()),)), r"objective\.kl\.weight=\(\) should be a list of values"),
        (dict(keys=(1, 2)), "config.sweep.keys: give pairs of a dotted key and its values"),
        (dict(sampler="annealing"), "sampler='annealing': have grid, random, tpe"),
        (dict(sampler="tpe", trials=0), "config.sweep.trials=0 must be at least 1"),
        (
            dict(sampler="tpe", keys=((WEIGHT, dict(low=1.0)),)),
            "kl.weight=.*low.*: give low and high",
        ),
        (dict(sampler="tpe", keys=((WEIGHT, dict(lo=1.0)),)), "unknown key .*lo"),
        (dict(stage="teacher"), "sweep.stage='teacher' is no stage .* has baseline, student"),
        (dict(samplr="tpe"), r"unknown key config\.sweep\.samplr"),
    ],
)
def test_mistakes(settings, message, tmp_path):
    with scored(by_weight) as ran, pytest.raises(UserError, match=message):
        settings = dict(keys=((WEIGHT, (1.0,)),)) | settings
        made = config(*settings.pop("keys"), stages=("baseline", "student"))
        made.sweep.update(settings)
        run(made, tmp_path)
    assert not ran


@pytest.fixture(scope="module")
def trained(folder):
    """Trials that differ in numbers alone, trained; and what was compiled for them."""
    keys = ((TEMPERATURE, (3.0, 1.0)), ("optim.learning_rate", (1e-3, 1e-4)))
    settings = config(*keys)
    shapes, step = set(), loop.train_step

    def note(state, batch, *args, **kwargs):
        shapes.add(batch.tokens_BT.shape)
        return step(state, batch, *args, **kwargs)

    with smoke.compilations() as compiled, mock.patch.object(loop, "train_step", note):
        note.clear_cache = step.clear_cache
        found = run(settings, folder / "trained")
    return found, folder / "trained", compiled, shapes


def test_one_compilation_for_each_length(trained):
    found, _, compiled, shapes = trained
    assert len(found["trials"]) == 4 and compiled["jit(train_step)"] == len(shapes)


def test_a_trial_is_the_run_with_these_settings(trained, folder):
    """There the temperature is a constant."""
    found, place, *_ = trained
    alone = finetuning.config("student")
    assert alone.objective.kl.temperature == 3.0 and alone.optim.learning_rate == 1e-3
    finetuning.run(alone, folder / "alone")
    trial = place / "trials" / found["trials"][0]["folder"] / "student"
    with_columns = read_rows(folder / "alone" / "student"), read_rows(trial)
    for ours, theirs in zip(*with_columns, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)
    values = {read_rows(path)[0]["kl"] for path in place.glob("trials/*/student")}
    assert len(values) == 2  # first steps differ by the temperature alone


def read_rows(folder):
    lines = (folder / "metrics.csv").read_text().splitlines()
    names = lines[0].split(",")
    return [dict(zip(names, map(float, line.split(",")), strict=True)) for line in lines[1:]]


def test_the_best_is_measured_on_the_reported_split(trained):
    found, place, *_ = trained
    assert found["best"]["figures"]["accuracy"] == max(
        trial["figures"]["accuracy"] for trial in found["trials"]
    )
    assert "classes" in found["stages"]["student"] and found["split"] == "test"
    support = [one["support"] for one in found["stages"]["student"]["classes"].values()]
    assert sum(support) == found["data"]["test"]["examples"]
    assert kept(place) == [f"{found['best']['trial']:03d}"]


def test_a_stage_of_language_models_by_its_loss(tmp_path):
    """Pruning, whose model differs from trial to trial."""
    c = substituting.config(tmp_path)
    c.recipe, c.steps, c.stages = "sweep", 2, dict(prune={})
    c.pruning.target = 0.1  # of none of the trials
    c.sweep = defaults.sweep(("pruning.target", (0.3, 0.2)))
    c.sweep.stage = "prune"
    with substituting.quick(), workdir.enter(c, "example", str(tmp_path / "run")) as place:
        found = sweep.run(c, place)
    losses = [trial["figures"]["loss"] for trial in found["trials"]]
    assert found["best"]["figures"]["loss"] == min(losses) != max(losses)
    assert found["primary"] == "loss" and found["stages"]["prune"]["kl"] > 0
    sizes = [trial["figures"]["parameters"] for trial in found["trials"]]
    assert sizes[0] < sizes[1]
    left = [path.parts[-3] for path in tmp_path.glob("run/trials/*/prune/checkpoints")]
    assert left == [found["best"]["folder"]]


def test_ensembles_have_no_trials(tmp_path):
    c = ensembles.config(tmp_path)
    c.recipe, c.sweep = "sweep", defaults.sweep(("optim.learning_rate", (0.1, 0.2)))
    c.sweep.stage = "round"
    with pytest.raises(UserError, match="stage round is one of the recipe 'ensemble' alone"):
        with substituting.quick(), workdir.enter(c, "example", str(tmp_path / "run")) as place:
            sweep.run(c, place)
