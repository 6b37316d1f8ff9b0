"""Runs of substitution: what they leave, and that a killed one ends as if it had not been."""

import itertools
import json

import jax
import numpy as np
import pytest
from flax import nnx

from benchmarks import kill_resume
from kd_jax.stages import substitute, swaps
from kd_jax.train import loop, records
from tests.recipes import substituting


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("substitute")
    return substituting.undisturbed(substituting.config(folder), substituting.run, folder)


def test_the_parameters_go_phase_by_phase(whole):
    _, folder, results, _ = whole
    rows = records.read(folder / "substitute" / "swaps.csv")
    assert [(row["step"], row["blocks"]) for row in rows] == [("0", "2"), ("3", "1"), ("6", "0")]
    sizes = [int(row["parameters"]) for row in rows]
    stage, teacher = results["stages"]["substitute"], results["stages"]["teacher"]
    assert stage["parameters"] == sizes[-1] < sizes[1] < sizes[0] < teacher["parameters"]
    reduction = 100 * (1 - sizes[-1] / teacher["parameters"])
    assert stage["reduction_percent"] == pytest.approx(reduction, abs=0.01)
    assert {"loss", "perplexity", "kl", "agreement"} <= stage.keys() and stage["kl"] > 0
    assert teacher["reduction_percent"] == 0 and "kl" not in teacher


def test_one_program_a_phase(whole):
    """A train step and an eval step for each of three models; an eval step for the teacher."""
    *_, compiled = whole
    assert compiled["jit(train_step)"] == 3
    assert compiled["jit(eval_step)"] == 4


def test_metrics_are_of_one_stage(whole):
    _, folder, _, _ = whole
    steps = [int(row["step"]) for row in records.read(folder / "substitute" / "metrics.csv")]
    assert steps == list(range(1, 11))
    judged = [int(row["step"]) for row in records.read(folder / "substitute" / "eval.csv")]
    assert judged == [2, 3, 4, 6, 8, 10]  # at the end of a phase too
    best = kill_resume.checkpoints(folder, "substitute")
    assert best[-1] == 10 and min(best) > 6


KILLS = ["step 3", "swap 2", "step 5", "step 9"]  # swap 2 is after step 3


@pytest.fixture
def kill(monkeypatch):
    """Ends a run at the start of a step, or within a swap."""

    def arm(when):
        kind, number = when.split()
        if kind == "step":
            step = loop.train_step

            def train_step(state, *args, **kwargs):
                if int(state.step) + 1 == int(number):
                    raise substituting.Killed
                return step(state, *args, **kwargs)

            monkeypatch.setattr(loop, "train_step", train_step)
            return
        make_state = substitute.Substituted._swapped

        def dying(self, *args):
            if self.swap.number == int(number):
                raise substituting.Killed
            return make_state(self, *args)

        monkeypatch.setattr(substitute.Substituted, "_swapped", dying)

    return arm


def test_killed_again_and_again_it_ends_the_same_bit_for_bit(whole, tmp_path, kill, monkeypatch):
    config, folder, results, _ = whole
    for when in KILLS:
        kill(when)
        with pytest.raises(substituting.Killed):
            substituting.run(config, tmp_path / "run")
        monkeypatch.undo()
    again = substituting.run(config, tmp_path / "run")
    assert kill_resume.differences(folder, tmp_path / "run") == []
    assert again["stages"]["substitute"]["loss"] == results["stages"]["substitute"]["loss"]


def test_a_run_that_has_ended_only_shows_its_table(whole, capsys):
    config, folder, results, _ = whole
    assert substituting.run(config, folder) == results
    assert "reduction of parameters" in capsys.readouterr().out


def test_regression_before_a_swap(tmp_path, monkeypatch):
    """The new blocks come nearer to the old ones, nothing else moves; killed within it, the run
    ends the same."""
    seen, fitted = [], substitute.Substituted._fitted

    def noted(self, old, new):
        before = jax.device_get(new)
        after = fitted(self, old, new)
        seen.append((before, jax.device_get(after)))
        return after

    monkeypatch.setattr(substitute.Substituted, "_fitted", noted)
    settings = dict(blocks=2, target=0.3, fit_steps=6, fit_learning_rate=3e-2)
    config = substituting.config(tmp_path, **settings)
    substituting.run(config, tmp_path / "whole")
    ((before, after),) = seen
    old, new = before["backbone"].pop("blocks"), after["backbone"].pop("blocks")
    jax.tree.map(np.testing.assert_array_equal, (before, old[0]), (after, new[0]))
    for layer in (1, 2):
        moved = jax.tree.map(lambda a, b: np.any(a != b), old[layer], new[layer])
        assert all(jax.tree.leaves(moved))
    rows = records.read(tmp_path / "whole/substitute/fitted/1/metrics.csv")
    assert float(rows[-1]["loss"]) < 0.9 * float(rows[0]["loss"])

    monkeypatch.setattr(loop, "train_step", substituting.dies(loop.train_step, 3))
    with pytest.raises(substituting.Killed):
        substituting.run(config, tmp_path / "killed")
    monkeypatch.undo()
    substituting.run(config, tmp_path / "killed")
    assert kill_resume.differences(tmp_path / "whole", tmp_path / "killed") == []


def test_importance_is_one_minus_the_cosine_and_kept(tmp_path, monkeypatch):
    config = substituting.config(tmp_path, order="importance", importance_batches=1)
    run = substituting.build(config, tmp_path)
    assert [row["blocks"] for row in run.principal.swaps] == [None] * 3
    whole = run.models["teacher"]
    given = {"teacher": jax.jit(whole.draw)(jax.random.key(3))}
    with substituting.quick():
        run.ready("substitute", given)
    batch = run.task.train(config.batch_size, config.seed)[0]
    module = nnx.merge(whole.abstract().graphdef, given["teacher"])
    hidden, _ = module.backbone.states(batch, None)
    wanted = []
    for x, y in itertools.pairwise(np.asarray(each, np.float64) for each in hidden):
        lengths = np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1)
        wanted.append(1 - ((x * y).sum(-1) / lengths).mean())
    found = json.loads((tmp_path / "importance.json").read_text())["importance"]
    np.testing.assert_allclose(found, wanted, rtol=1e-4)
    least_first = sorted(range(3), key=lambda layer: found[layer])
    assert [swap.layers for swap in swaps.of(run)] == [(layer,) for layer in least_first]
    again = substituting.build(config, tmp_path)
    assert swaps.of(again) == swaps.of(run) and swaps.known(again)
    assert again.principal.measure_first is None
