"""Runs of substitution: what they leave, and that a killed one ends as if it had not been."""

import json
import shutil

import jax
import numpy as np
import pytest

from benchmarks import kill_resume
from kd_jax.recipes import fitting, swap
from kd_jax.train import loop, records
from tests import smoke
from tests.recipes import substituting


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(config, folder, results, programs compiled) of an undisturbed run."""
    folder = tmp_path_factory.mktemp("substitute")
    config = substituting.config(folder)
    with smoke.compilations() as compiled:
        results = substituting.run(config, folder / "run")
    return config, folder / "run", results, dict(compiled)


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


KILLS = ["step 1", "step 3", "swap 2", "born 2", "step 5", "swap 3", "step 7", "step 10"]


@pytest.fixture
def kill(monkeypatch):
    """Ends a run with `Killed` at the start of a step, within a swap, or after it."""

    def arm(when):
        kind, number = when.split()
        if kind == "step":
            step = loop.train_step

            def train_step(state, *args, **kwargs):
                if int(state.step) + 1 == int(number):
                    raise Killed
                return step(state, *args, **kwargs)

            monkeypatch.setattr(loop, "train_step", train_step)
            return
        name = "_state" if kind == "swap" else "_note"
        method = getattr(swap.Substituted, name)

        def dying(self, *args):
            if self.phase.number == int(number):
                raise Killed
            return method(self, *args)

        monkeypatch.setattr(swap.Substituted, name, dying)

    return arm


@pytest.mark.parametrize("when", KILLS)
def test_killed_and_continued_is_the_same_bit_for_bit(whole, tmp_path, kill, monkeypatch, when):
    config, folder, results, _ = whole
    kill(when)
    with pytest.raises(Killed):
        substituting.run(config, tmp_path / "run")
    monkeypatch.undo()
    again = substituting.run(config, tmp_path / "run")
    assert kill_resume.differences(folder, tmp_path / "run") == []
    assert again["stages"]["substitute"]["loss"] == results["stages"]["substitute"]["loss"]


def test_a_difference_would_be_seen(whole, tmp_path):
    config, folder, *_ = whole
    other = config.copy_and_resolve_references()
    other.substitution.warmup = 1
    substituting.run(other, tmp_path / "run")
    assert "substitute/metrics.csv" in kill_resume.differences(folder, tmp_path / "run")


def test_a_run_that_has_ended_only_shows_its_table(whole, capsys):
    config, folder, results, _ = whole
    assert substituting.run(config, folder) == results
    assert "reduction of parameters" in capsys.readouterr().out


def test_regression_before_each_swap(tmp_path, kill, monkeypatch):
    """The new blocks come nearer to the old ones, nothing else moves; killed within it, the run
    ends the same."""
    seen = []
    method = fitting.fitted

    def noted(setup, stage, phase, old, new, directory):
        before = jax.device_get(new.params)
        after = method(setup, stage, phase, old, new, directory)
        seen.append((phase.layers[0], before, jax.device_get(after)))
        return after

    monkeypatch.setattr(swap, "fitted", noted)
    config = substituting.config(tmp_path, fit_steps=6, fit_learning_rate=3e-2, target=0.2)
    substituting.run(config, tmp_path / "whole")
    assert [layer for layer, *_ in seen] == [2, 1]
    for layer, before, after in seen:
        old, new = before["backbone"].pop("blocks"), after["backbone"].pop("blocks")
        jax.tree.map(np.testing.assert_array_equal, before, after)
        for other in {0, 1, 2} - {layer}:
            jax.tree.map(np.testing.assert_array_equal, old[other], new[other])
        moved = jax.tree.map(lambda a, b: np.any(a != b), old[layer], new[layer])
        assert all(jax.tree.leaves(moved))
    losses = [
        float(row["loss"])
        for row in records.read(tmp_path / "whole/substitute/fitted/2/metrics.csv")
    ]
    assert losses[-1] < 0.9 * losses[0]
    assert not (tmp_path / "whole/substitute/fitted/1").exists()

    steps = iter(range(100))
    step = loop.train_step

    def train_step(state, *args, **kwargs):
        if next(steps) == 6 + 3 + 3:  # within the second regression
            raise Killed
        return step(state, *args, **kwargs)

    monkeypatch.setattr(loop, "train_step", train_step)
    with pytest.raises(Killed):
        substituting.run(config, tmp_path / "killed")
    monkeypatch.undo()
    substituting.run(config, tmp_path / "killed")
    assert kill_resume.differences(tmp_path / "whole", tmp_path / "killed") == []


def test_importance_is_measured_once_and_kept(tmp_path, monkeypatch):
    config = substituting.config(tmp_path, order="importance")
    substituting.run(config, tmp_path / "run")
    found = json.loads((tmp_path / "run/importance.json").read_text())["importance"]
    least_first = sorted(range(3), key=lambda layer: found[layer])
    rows = records.read(tmp_path / "run/substitute/swaps.csv")
    assert [int(row["blocks"]) for row in rows] == least_first
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "run", other)
    (other / "results.json").unlink()
    monkeypatch.setattr(swap.Substituted, "enter", None)
    substituting.run(config, other)  # everything is read again, nothing is made
    order = substituting.setup(config, other).phases
    assert [phase.layers[0] for phase in order] == least_first


def test_students_beside_it_have_as_many_parameters(tmp_path):
    config = substituting.config(tmp_path)
    config.stages = dict(teacher={}, substitute={}, student={})
    found = substituting.run(config, tmp_path / "run")["stages"]
    assert list(found) == ["teacher", "substitute", "student"]
    assert found["student"]["parameters"] == found["substitute"]["parameters"]
    assert found["student"]["reduction_percent"] == found["substitute"]["reduction_percent"]
    assert not (tmp_path / "run/student/swaps.csv").exists()
