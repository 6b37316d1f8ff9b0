"""What is said of runs: their data and stages, and those from which nothing follows."""

import math
from types import SimpleNamespace

import pytest
from ml_collections import ConfigDict

from kd_jax import schedules
from kd_jax.run import results
from kd_jax.train.loop import Fit

GOOD = {
    "teacher": {"loss": 0.3, "accuracy": 0.9, "confusion": [[45, 5], [5, 45]]},
    "baseline": {"loss": 0.5, "accuracy": 0.7, "confusion": [[35, 15], [15, 35]]},
    "student": {"loss": 0.4, "accuracy": 0.8, "confusion": [[40, 10], [10, 40]]},
}
ROLES = {name: name for name in GOOD}
TASK = SimpleNamespace(
    head="classification", primary="accuracy", larger=True, regression=False, labels=("a", "b")
)
TEXT = SimpleNamespace(head="clm", primary="loss", larger=False, tokenizer=range(100))


def found(changes=None, task=TASK):
    stages = {name: figures | (changes or {}).get(name, {}) for name, figures in GOOD.items()}
    return results.remarks(stages, task, ROLES)


def test_a_run_that_is_worth_something_is_not_commented():
    assert found() == []
    assert found(task=TEXT) == []
    assert results.remarks({"student": {"loss": 2.0}}, TASK, {"student": "student"}) != []
    assert results.remarks({"student": {"loss": 2.0}}, TEXT, {"student": "student"}) == []


@pytest.mark.parametrize("value", [0.7, 0.6])
def test_a_teacher_that_is_no_better_than_the_baseline(value):
    (line,) = found({"teacher": {"accuracy": value}})
    assert line.startswith("teacher is no better than baseline") and "nothing to distil" in line


def test_distillation_that_did_not_help():
    (line,) = found({"student": {"loss": 0.6}}, TEXT)
    assert line == (
        "distillation did not help: student is no better than baseline (loss 0.6000 and 0.5000)"
    )


def test_a_uniform_guess():
    chance = {"accuracy": 0.5, "confusion": [[25, 25], [25, 25]]}
    line, *_ = found({"student": chance | {"loss": math.log(2) * 0.995}})
    assert line.startswith("student has learnt nothing: its loss of 0.6897")
    line, *_ = found({"student": chance | {"loss": math.log(2) * 0.98}})
    assert line.startswith("student is no better than naming the most frequent class")
    assert found({"student": {"loss": 2.0}}) == []  # too sure of itself, but mostly right
    (line,) = results.remarks({"teacher": {"loss": 4.6}, "student": {"loss": 4.5}}, TEXT, ROLES)
    assert line.startswith("teacher has learnt nothing: its loss of 4.6000")


def test_the_most_frequent_class():
    lines = found({"teacher": {"accuracy": 0.75, "confusion": [[75, 0], [25, 0]]}})
    assert lines == [
        "teacher is no better than naming the most frequent class always (accuracy 0.7500 and "
        "0.7500)"
    ]


def stage(kind="linear", steps=100, learns=True, **more):
    config = ConfigDict({"learning_rate": 1e-3, "schedule": {"kind": kind, **more}})
    rate = schedules.learning_rate(config, steps)
    objective = SimpleNamespace(names=["ce", "kl"])
    return SimpleNamespace(
        name="student",
        steps=steps,
        batch_size=16,
        epochs=2.5,
        learns=learns,
        teachers=("teacher",),
        program=SimpleNamespace(objective=objective),
        schedules=SimpleNamespace(learning_rate=rate),
    )


def test_what_a_stage_does():
    text = results.describe_stage(stage(steps=1200))
    assert text == "student: 1,200 steps of 16 rows (2.5 epochs), ce, kl from teacher"
    assert results.describe_stage(stage(learns=False)).endswith("ce, kl")


def test_a_stage_shorter_than_its_warmup():
    text = results.describe_stage(stage("linear", 10, warmup=100))
    assert text.endswith("warms up: train longer, or lower optim.schedule.warmup")
    for kind, more in (("linear", {"warmup": 5}), ("constant", {}), ("one_cycle", {})):
        assert "warms" not in results.describe_stage(stage(kind, 10, **more))


def test_a_stage_that_stopped_early():
    assert results.describe_end(stage(), Fit(None, 80, 100)) == []
    (line,) = results.describe_end(stage(), Fit(None, 20, 50))
    assert line.startswith(
        "student stopped after 50 of 100 steps: nothing was better than step 20 (config.patience); "
        "the learning rate was at 50% of its peak: a schedule of fewer steps"
    )
    (line,) = results.describe_end(stage(), Fit(None, 60, 90))
    assert line.endswith("at 10% of its peak")


def test_what_was_read():
    data = {
        "train": dict(name="a.csv", examples=40, classes={"no": 30, "yes": 10}, longest=70, cut=2),
        "test": dict(name="b.txt", documents=2, tokens=12_345, rows=100),
    }
    assert results.describe_data(data, 64) == [
        "train: a.csv, 40 examples; classes: no 30, yes 10; the longest has 70 tokens; 2 (5.0%) do "
        "not fit into 64 tokens",
        "test: b.txt, 2 documents, 12,345 tokens, 100 rows",
    ]
    vectors = {"train": dict(name="a", examples=9, texts=10, cut=2)}
    assert results.describe_data(vectors, 8) == [
        "train: a, 9 examples, 10 texts; 2 (20.0%) do not fit into 8 tokens"
    ]
    many = {"train": dict(name="a", examples=9, classes=dict.fromkeys("abcdefghijk", 1))}
    assert results.describe_data(many, 8)[0].endswith("h 1, 3 more")
