"""The recipe on tiny models: stored teachers, stages, what is chosen by what, and mistakes."""

import contextlib
import copy
import csv
import dataclasses
import json
import logging
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
from etils import epath

from kd_jax.errors import UserError
from kd_jax.metrics.classification import compare_with_teacher
from kd_jax.run import measure, stage, teaching
from kd_jax.run.run import build
from kd_jax.run.teaching import TeacherLogits, attach, check_tokens, given_teachers
from kd_jax.tasks.classification import ClassificationTask
from kd_jax.tasks.squad import Squad
from kd_jax.teachers.ensemble import Several, Stored
from kd_jax.train import loop
from kd_jax.types import Model
from tests.recipes import finetuning

pytestmark = pytest.mark.usefixtures("caches")

ONLINE = dict(max_gb=0.0, folder="")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("finetune")


@contextlib.contextmanager
def watched():
    """Notes what happens: steps, scores of which split, how many rows a teacher computes."""
    seen = []

    def note(owner, name, what):
        original = getattr(owner, name)

        def call(*args, **kwargs):
            seen.append(what(*args))
            return original(*args, **kwargs)

        return mock.patch.object(owner, name, call)

    with (
        note(loop, "train_step", lambda state, batch, teacher, *_: ("step", type(teacher))),
        note(ClassificationTask, "score", lambda self, split, outputs: ("score", split)),
        note(teaching, "BucketStream", lambda lengths_N, *_: ("logits", len(lengths_N))),
    ):
        yield seen


@dataclasses.dataclass(frozen=True)
class Run:
    folder: Path
    results: dict
    seen: list

    def bytes(self, *names):
        return [(self.folder / name).read_bytes() for name in names]

    def rows(self, stage, name="metrics"):
        with (self.folder / stage / f"{name}.csv").open() as file:
            return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def run(config, folder):
    with watched() as seen:
        return Run(folder, finetuning.run(config, folder), seen)


def cached(folder, *stages, **changes):
    """A config whose teachers' logits are kept in `folder`."""
    cache = dict(max_gb=1.0, folder=str(folder / "logits"))
    return finetuning.config(*stages, cache=cache, **changes)


def check_same_metrics(ours, theirs, stage="student"):
    assert len(ours.rows(stage)) == 4
    for a, b in zip(ours.rows(stage), theirs.rows(stage), strict=True):
        assert a == pytest.approx(b, rel=1e-6, abs=1e-6)


@pytest.fixture(scope="module")
def stored(folder):
    """A student beside stored logits."""
    return run(cached(folder, "student"), folder / "stored")


def test_stored_logits_and_a_teacher_in_the_step_are_the_same(stored, folder):
    online = run(finetuning.config("student", cache=ONLINE), folder / "online")
    assert ("step", Stored) in stored.seen and ("step", Stored) not in online.seen
    check_same_metrics(online, stored)
    kl = stored.results["stages"]["student"]["kl"]
    assert online.results["stages"]["student"]["kl"] == pytest.approx(kl, rel=1e-5) and kl > 0.1


@pytest.mark.parametrize("task", ["agnews", "squad"])
def test_stored_answers_are_those_of_the_step(task, tmp_path):
    """In other batches, and padded to other lengths."""
    config = finetuning.config("student", task=task, cache=ONLINE)
    with finetuning.quick():
        built = build(config, epath.Path(tmp_path))
        teachers = TeacherLogits(built, given_teachers(built))
        found = teachers.of("teacher", "train")
        with_logits = attach(found, task == "squad", len(built.task.labels))
        forward = jax.jit(lambda model, batch: model(batch).logits)
        stream = built.task.train(16, 3)
        for step in range(2):
            batch = stream[step]
            online = forward(teachers.model("teacher"), batch)
            logits = with_logits(batch).stored["teacher"].values_BPK
            np.testing.assert_allclose(logits, online, rtol=1e-6, atol=2e-6)
            assert np.ptp(logits[:, 0, 0]) > 0.01


def test_a_teacher_in_the_step_reads_its_own_token_types(tmp_path):
    """Beside a student of equal tokens whose tokenizer, as DistilBERT's, gives no types."""
    config = finetuning.config("student", task="squad", cache=ONLINE)
    with finetuning.quick():
        built = build(config, epath.Path(tmp_path))
        teachers = TeacherLogits(built, given_teachers(built))
        found = teachers.of("teacher", "train")
        with_logits = attach(found, spans=True, size=0)
        untyped = copy.deepcopy(built.tasks["student"].tokenizer)
        untyped.model_input_names = ["input_ids", "attention_mask"]
        built.tasks["student"] = built.tasks["student"].with_tokenizer(untyped)
        this = built.stages[0]
        check_tokens(built, this)
        teacher, stream = teaching.teacher_and_batches(built, this, teachers)
        batch = stream[0]
        assert batch.types_BT is None
        online = jax.jit(lambda teacher, batch: teacher(batch).logits)(teacher, batch)
        logits = with_logits(batch).stored["teacher"].values_BPK
        np.testing.assert_allclose(logits, online, rtol=1e-6, atol=2e-6)


def test_answers_that_are_not_finite_are_said_and_not_stored(folder, tmp_path, monkeypatch):
    """Before a student trains beside them."""
    built = build(cached(tmp_path, "student"), epath.Path(tmp_path))
    teachers = TeacherLogits(built, given_teachers(built))

    def predict(model, part, *args):
        rows = {int(i): np.zeros(4, np.float32) for batch in part for i in batch.ids_B}
        rows[3][2], rows[7][0] = np.nan, np.inf
        return rows

    monkeypatch.setattr(teaching, "predict", predict)
    name = built.models["teacher"].name
    message = f"teacher {name}: its logits of 2 of .* rows of train are not finite .row 3 is the "
    with pytest.raises(UserError, match=message):
        teachers.of("teacher", "train")
    assert not list(tmp_path.glob("logits/**/*.npy"))


def test_logits_that_cannot_be_kept_are_computed_all_the_same(tmp_path, caplog):
    config = cached(tmp_path, "student")
    (tmp_path / "logits").write_text("no folder")
    built = build(config, epath.Path(tmp_path))
    found = TeacherLogits(built, given_teachers(built)).of("teacher", "train", np.arange(3))
    assert np.isfinite(found[:3]).all() and found[3] is None
    assert "teacher logits are kept for this run alone: cannot write" in caplog.text
    assert "set config.cache.folder" in caplog.text


def test_what_is_stored_is_not_computed_again(stored, folder):
    """Neither by a run of another seed, nor by its later stages."""
    assert [what for what in stored.seen if what[0] == "logits"] == [
        ("logits", 48),  # the test split, for its own figures
        ("logits", 64),  # of the training data, what four steps see
        ("logits", 32),
    ]
    again = run(cached(folder, "baseline", "student", seed=1), folder / "again")
    computed = [rows for what, rows in again.seen if what == "logits"]
    assert len(computed) == 1 and computed[0] < 64  # rows that the first run did not see


def test_logits_of_a_stage_s_teachers_are_averaged_once(stored, folder, monkeypatch):
    calls, original = [], teaching.together
    monkeypatch.setattr(teaching, "together", lambda *a: calls.append(a[3]) or original(*a))
    run(cached(folder, "student"), folder / "once")
    assert calls.count("train") == 1


def test_the_reported_split_selects_nothing(stored):
    order = [what for what in stored.seen if what[0] in ("step", "score")]
    step, judge = ("step", Stored), ("score", "validation")
    teacher_first = [("score", "test")]
    assert order == teacher_first + [step, step, judge] * 2 + [("score", "test")]


def test_killed_in_the_student_s_stage(stored, folder):
    """The same folder of logits, another run directory: everything is bitwise the same."""
    config, place, real = cached(folder, "student"), folder / "killed", loop.train_step
    calls = []

    def killed(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    with mock.patch.object(loop, "train_step", killed), pytest.raises(KeyboardInterrupt):
        finetuning.run(config, place)
    assert not (place / "student" / "results.json").exists()
    again = run(config, place)
    assert [what for what in again.seen if what[0] == "step"] == [("step", Stored)] * 2
    files = ["student/metrics.csv", "student/eval.csv", "export/student/model.safetensors"]
    assert again.bytes(*files) == stored.bytes(*files)
    figures = again.results["stages"]["student"], stored.results["stages"]["student"]
    for name in ("loss", "accuracy", "kl", "agreement", "best_step"):
        assert figures[0][name] == figures[1][name]


def test_the_primary_figure_chooses_and_stops(folder):
    accuracies, losses = iter([0.5, 0.8, 0.6, 0.8, 0.9]), iter([3.0, 2.0, 1.0, 2.5, 0.5])

    def scripted(self, split, outputs):
        if split != "validation":
            return {"loss": 1.0, "accuracy": 0.1, "macro_f1": 0.1}
        return {"loss": next(losses), "accuracy": next(accuracies), "macro_f1": 0.1}

    config = finetuning.config("baseline", steps=6, patience=2)
    config.eval.every = 1
    with mock.patch.object(ClassificationTask, "score", scripted):
        found = run(config, folder / "stopped").results["stages"]["baseline"]
    assert (found["best_step"], found["steps"], found["accuracy"]) == (2, 4, 0.1)
    assert next(accuracies) == 0.9


def two(folder, **changes):
    """Two teachers; the second one has another tokenizer and another order of classes."""
    config = cached(folder, "student", average="probabilities")
    other = finetuning.checkpoint("other", classes=finetuning.OTHERS)
    config.teachers.other = finetuning.teacher(other, weight=3.0)
    config.update(changes)
    return config


def test_several_teachers(folder):
    together = run(two(folder), folder / "together")
    online = run(two(folder, cache=ONLINE), folder / "together-online")
    assert ("step", Several) in online.seen and ("step", Stored) in together.seen
    check_same_metrics(online, together)
    alone = {name: together.results["stages"][name]["accuracy"] for name in ("teacher", "other")}
    assert len(set(alone.values())) == 2
    with finetuning.quick():
        built = build(two(folder), epath.Path(folder / "together"))
        orders = {name: built.order(name) for name in built.models}
        assert orders == {"teacher": None, "other": (1, 2, 3, 0), "student": None}
        assert built.weights(built.stages[0].teachers) == [0.25, 0.75]


def test_an_assistant_teaches_the_student(folder):
    config = cached(folder, "assistant", "student", steps=2)
    config.assistant.architecture = dict(num_hidden_layers=1)
    config.assistant.init = "scratch"
    asked, of = [], TeacherLogits.of

    def note(self, name, split, *args):
        asked.append((name, split, of(self, name, split, *args)))
        return asked[-1][-1]

    with mock.patch.object(TeacherLogits, "of", note):
        found = run(config, folder / "assistant")
    assert list(found.results["stages"]) == ["teacher", "assistant", "student"]
    names = [names for names, *_ in asked]
    assert names[0] == "teacher" and names[-1] == "assistant"
    assert names == sorted(names, reverse=True)  # each stage asks its own teacher alone
    beside = next(rows for name, split, rows in asked if (name, split) == ("assistant", "test"))
    theirs = next(rows for name, split, rows in asked if (name, split) == ("teacher", "test"))
    assert compare_with_teacher(beside, theirs)["kl"] == pytest.approx(
        found.results["stages"]["assistant"]["kl"], rel=1e-5
    )


def test_the_student_goes_on_from_its_intermediate_stage(folder, caplog):
    config = cached(folder, "baseline", "intermediate", "student", steps=2)
    config.intermediate = dict(hidden=dict(weight=1.0, kind="mse", layers=((0, 0), (1, 1))))
    begun, fit = {}, loop.fit

    def note(state, **kwargs):
        first = jax.device_get(state.params["student"])  # the state is donated
        fitted = fit(state, **kwargs)
        begun[kwargs["stage"]] = first, jax.device_get(fitted.state.params["student"])
        assert fitted.best_step == 2 or kwargs["stage"] != "intermediate"
        return fitted

    with (
        mock.patch.object(loop, "fit", note),
        caplog.at_level(logging.INFO, "kd_jax.run.teaching"),
    ):
        found = run(config, folder / "intermediate")
    equal = lambda a, b: all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))  # noqa: E731
    assert equal(begun["student"][0], begun["intermediate"][1])
    assert equal(begun["intermediate"][0], begun["baseline"][0])
    assert not equal(begun["student"][0], begun["baseline"][0])
    assert found.rows("intermediate", "eval") == []
    assert "intermediate: teacher at every step, since the objective reads more" in caplog.text
    assert "student: logits of teacher, computed once for each row" in caplog.text


def test_a_regression(folder):
    found = run(cached(folder, "student", task="stsb"), folder / "stsb")
    for name in ("teacher", "student"):
        figures = found.results["stages"][name]
        assert {"loss", "pearson", "spearman"} <= figures.keys() and "kl" not in figures
    assert {"mse", "logit_mse", "mse_weighted"} <= found.rows("student")[0].keys()
    assert found.results["primary"] == "spearman"
    student = found.results["stages"]["student"]
    assert student["loss"] != found.results["stages"]["teacher"]["loss"]


def test_the_null_threshold_is_tuned_on_validation(folder):
    tuned, scored = [], []
    tune, score = Squad.tuned, Squad.score

    def note_tuned(self, outputs):
        assert len(outputs) == len(self.rows("validation")) != len(self.rows("test"))
        tuned.append(tune(self, outputs))
        return tuned[-1]

    def note_score(self, split, outputs):
        scored.append((split, self.threshold))
        return score(self, split, outputs)

    config = cached(folder, "student", task="squad", steps=2)
    assert "v2.0" in config.data.train.path
    with (
        mock.patch.object(Squad, "tuned", note_tuned),
        mock.patch.object(Squad, "score", note_score),
    ):
        found = run(config, folder / "squad")
    own = [task.threshold for task in tuned]
    stages = found.results["stages"]
    assert [stages[name]["null_threshold"] for name in ("teacher", "student")] == own
    assert scored == [("test", own[0]), ("validation", None), ("test", own[1])]
    assert "HasAns_f1" in stages["student"] and stages["student"]["kl"] > 0


def test_a_finished_run_prints_its_table(stored, folder, capsys):
    before = json.dumps(stored.results)
    again = run(cached(folder, "student"), stored.folder)
    assert json.dumps(again.results) == before and not again.seen
    assert "example, test split" in capsys.readouterr().out


def test_best_is_restored(stored, folder):
    with finetuning.quick():
        built = build(cached(folder, "student"), epath.Path(stored.folder))
        (this,) = built.stages
        params = stage.restore_best(built, this)
        model = Model(params, built.models[this.model].abstract().graphdef)
        teachers = TeacherLogits(built, given_teachers(built))
        figures = measure.figures(built, this, model, teachers, "test")
    kept = stored.results["stages"]["student"]
    assert {k: kept[k] for k in figures} == figures
