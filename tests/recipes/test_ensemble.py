"""Runs of sequential ensembles: what they leave, and that a killed one ends as if it had not."""

import csv
import json
import shutil

import numpy as np
import pytest

from benchmarks import kill_resume
from kd_jax.errors import UserError
from kd_jax.run import text_logits
from kd_jax.run.run import build
from kd_jax.stages import round
from kd_jax.stages.round import training_flops
from kd_jax.train import loop
from tests import smoke
from tests.recipes import ensembles, substituting


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ensemble")
    return substituting.undisturbed(ensembles.config(folder), ensembles.whole_run, folder)


def test_a_row_a_round(whole):
    _, folder, results, _ = whole
    rows = list(csv.DictReader((folder / "rounds.csv").read_text().splitlines()))
    # The first seven are those of slm_ensembles.
    assert " ".join(rows[0]) == (
        "round teacher_eval_loss ensemble_eval_loss student_eval_loss ensemble_size "
        "round_duration_minutes total_elapsed_minutes ensemble_perplexity student_perplexity "
        "ensemble_kl student_kl ensemble_agreement student_agreement ensemble_parameters gain"
    )
    assert [row["ensemble_size"] for row in rows] == ["1", "2", "3"]
    for row, found in zip(rows, results["rounds"], strict=True):
        assert float(row["ensemble_eval_loss"]) == found["ensemble"]["loss"]
        assert float(row["teacher_eval_loss"]) == results["stages"]["teacher"]["loss"]
        size = found["student"]["parameters"]
        assert int(row["ensemble_parameters"]) == size * found["members"]
    assert float(rows[2]["gain"]) == pytest.approx(
        float(rows[1]["ensemble_eval_loss"]) - float(rows[2]["ensemble_eval_loss"])
    )
    first = results["rounds"][0]
    for name in ("loss", "kl", "agreement"):  # one member is the whole ensemble
        assert first["student"][name] == pytest.approx(first["ensemble"][name], rel=1e-5)
    assert 0 < first["pass_compile_seconds"] <= first["pass_seconds"]
    assert (folder / "rounds.png").stat().st_size > 10_000
    assert results["stages"]["ensemble"] == results["rounds"][-1]["ensemble"]
    assert results["trend"]["kl"].keys() == {"limit", "limit_error", "slope", "slope_error"}


def test_operations_of_training(whole, tmp_path):
    """By hand: a step has three forward passes of the student, a pass over the rows one."""
    config, _, results, _ = whole

    def forward(width, layers, rows):
        kernels = 12 * width * width * layers
        attention = 2 * 16 * width * layers
        return 2 * rows * 16 * (kernels + attention + 280 * width)

    steps = 3 * ensembles.ROUNDS * ensembles.STEPS * forward(8, 1, 8)
    passes = forward(16, 3, 60) + (ensembles.ROUNDS - 1) * forward(8, 1, 60)
    assert results["stages"]["ensemble"]["training_flops"] == steps + passes
    assert results["stages"]["ensemble"]["steps"] == ensembles.ROUNDS * ensembles.STEPS

    fresh = config.copy_and_resolve_references()
    fresh.ensemble.fresh, fresh.rounds, fresh.ensemble.past_run_dirs = True, 2, ()
    run = build(fresh, tmp_path)
    every = 3 * forward(8, 1, 8) + forward(16, 3, 8) + 2.5 * forward(8, 1, 8)  # members: 2, then 3
    assert training_flops(run, run.principal, 2) == 2 * ensembles.STEPS * every


def test_a_mean_is_nearer_than_its_members(whole):
    """KL to the teacher is convex in the logits."""
    _, _, results, _ = whole
    alone = [each["student"]["kl"] for each in results["rounds"]]
    for n, each in enumerate(results["rounds"], 1):
        assert each["ensemble"]["kl"] <= np.mean(alone[:n]) + 1e-6
    assert results["rounds"][-1]["ensemble"]["kl"] < alone[-1]


def test_all_rounds_share_their_programs(whole):
    """One step for the first student, who is alone, and one for all others."""
    _, _, _, compiled = whole
    assert compiled["jit(train_step)"] == 2
    assert compiled["jit(log_probs_step)"] == 3  # the teacher, the first member, another


# In their order: (what dies, at which of its calls since the last death, in which round).
KILLS = [
    ((text_logits, "log_probs_step"), 2, 1),  # the teacher's pass, of eight batches
    ((loop, "train_step"), 2, 1),
    ((text_logits, "log_probs_step"), 2, 2),  # the first member's pass
    ((loop, "train_step"), 3, 2),
    ((round.Rounds, "_measured"), 1, 2),  # the round's figures, after one in its training
]


def test_killed_again_and_again_it_ends_the_same_bit_for_bit(whole, tmp_path, monkeypatch):
    config, folder, results, _ = whole
    shutil.rmtree(config.cache.folder)  # all is computed again
    for (owner, name), number, begun in KILLS:
        monkeypatch.setattr(owner, name, substituting.dies(getattr(owner, name), number))
        with pytest.raises(substituting.Killed):
            ensembles.run(config, tmp_path / "run")
        monkeypatch.undo()
        done = [path.parent.name for path in (tmp_path / "run").glob("round_*/results.json")]
        assert sorted(done) == [f"round_{n}" for n in range(1, begun)]
    again = ensembles.run(config, tmp_path / "run")
    assert kill_resume.differences(folder, tmp_path / "run") == []
    assert kill_resume.untimed(again["rounds"]) == kill_resume.untimed(results["rounds"])


def test_a_folder_is_no_round_that_is_done(whole, tmp_path):
    config, folder, results, _ = whole
    (tmp_path / "run" / "round_2" / "checkpoints").mkdir(parents=True)
    again = ensembles.run(config, tmp_path / "run")
    assert kill_resume.untimed(again["rounds"][1]) == kill_resume.untimed(results["rounds"][1])


def test_a_pass_is_made_once_for_all_runs_of_the_same_models(whole, tmp_path, monkeypatch):
    config, _, _, _ = whole
    ensembles.run(config, tmp_path / "one")
    monkeypatch.setattr(text_logits, "log_probs_step", lambda *args, **kwargs: pytest.fail("again"))
    ensembles.run(config, tmp_path / "two")


def test_members_of_earlier_runs_come_first(whole, tmp_path):
    config, folder, results, _ = whole
    more = config.copy_and_resolve_references()
    more.rounds, more.seed = 1, 5
    more.ensemble.past_run_dirs = (str(folder),)
    found = ensembles.run(more, tmp_path / "run")
    assert [each["members"] for each in found["rounds"]] == [4]
    assert found["rounds"][0]["ensemble"]["kl"] < results["rounds"][-1]["student"]["kl"]

    more.student.architecture.n_embd = 12
    with pytest.raises(UserError, match="past_run_dirs: .*round_1 holds a .*which does not fit"):
        ensembles.run(more, tmp_path / "other")
    more.ensemble.past_run_dirs = (str(tmp_path),)
    with pytest.raises(UserError, match="is no run directory"):
        ensembles.run(more, tmp_path / "third")


@pytest.mark.parametrize("changes", [dict(fresh=True), dict(start="previous"), dict(top_k=20)])
def test_other_ways(whole, tmp_path, changes):
    config = ensembles.config(tmp_path, **changes)
    config.rounds = 2
    if "top_k" in changes:
        config.cache.max_gb = 0.001  # not enough for all 280
    found = ensembles.run(config, tmp_path / "run")
    _, _, results, _ = whole
    first = [each["rounds"][0]["ensemble"]["loss"] for each in (found, results)]
    second = [each["rounds"][1]["ensemble"]["loss"] for each in (found, results)]
    assert (first[0] == first[1]) == ("start" in changes)
    assert second[0] != second[1]
    cached = list((tmp_path / "signals").glob("teacher_logits/*/sizes.npy"))
    assert bool(cached) == ("fresh" not in changes)
    assert {np.load(file)[0, 1] for file in cached} <= ({20} if "top_k" in changes else {280})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(space="mean"), "config.ensemble.space='mean': have logits, probabilities"),
        (dict(start="first"), "config.ensemble.start='first': have student, previous"),
        (dict(rows=10_000), "config.ensemble.rows=10000: the training text has "),
    ],
)
def test_settings_are_checked(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        ensembles.run(ensembles.config(tmp_path, **changes), tmp_path / "run")


def test_objectives_are_checked(tmp_path):
    config = ensembles.config(tmp_path)
    config.objective.hidden = dict(weight=1.0)
    with pytest.raises(UserError, match="config.objective.hidden: the mean of an ensemble has"):
        ensembles.run(config, tmp_path / "run")


def test_terms_about_logits_themselves_are_refused(tmp_path):
    config = ensembles.config(tmp_path)
    config.objective.logit_mse = dict(weight=1.0)
    with pytest.raises(UserError, match="config.objective.logit_mse compares logits themselves"):
        ensembles.run(config, tmp_path / "run")


def test_a_teacher_that_is_not_finite_is_said_before_a_student_trains(tmp_path, monkeypatch):
    monkeypatch.setattr(round.measure, "evaluate", lambda *args: {"loss": float("nan")})
    with pytest.raises(UserError, match="teacher .*: its loss on validation text is nan; its wei"):
        ensembles.run(ensembles.config(tmp_path), tmp_path / "run")
    assert not list(tmp_path.glob("run/*/results.json"))


@pytest.mark.parametrize("space", ["logits", "probabilities"])
def test_learned_weights_are_no_worse_on_what_they_were_learned_on(tmp_path, space, monkeypatch):
    monkeypatch.setattr(round, "STEPS", 20)
    config = ensembles.config(tmp_path, weights="learned", space=space)
    config.rounds, config.objective = 2, dict(kl=dict(weight=1.0))
    with smoke.guards():
        found = ensembles.run(
            config, tmp_path / "run"
        )  # reported on validation too: there is no test
    assert sum(found["weights"]) == pytest.approx(1.0)
    assert found["weights"][0] != pytest.approx(0.5, abs=1e-3)
    assert found["stages"]["learned"]["kl"] <= found["stages"]["ensemble"]["kl"] + 1e-6
    page = json.loads((tmp_path / "run" / "learned" / "results.json").read_text())
    assert page["weights"] == found["weights"]
