"""What is said of runs from which nothing follows, and that nothing is said of others."""

import math

import pytest
from ml_collections import ConfigDict

from kd_jax import schedules
from kd_jax.run import advice

GOOD = {
    "teacher": {"loss": 0.3, "accuracy": 0.9, "confusion": [[45, 5], [5, 45]]},
    "baseline": {"loss": 0.5, "accuracy": 0.7, "confusion": [[35, 15], [15, 35]]},
    "student": {"loss": 0.4, "accuracy": 0.8, "confusion": [[40, 10], [10, 40]]},
}


def found(changes=None, primary="accuracy", larger=True, classes=2):
    stages = {name: figures | (changes or {}).get(name, {}) for name, figures in GOOD.items()}
    return advice.of_figures(
        stages, primary, larger, classes, ["teacher"], ["baseline"], ["student"]
    )


def test_a_run_that_is_worth_something_is_not_commented():
    assert found() == []
    assert found(primary="loss", larger=False) == []
    assert advice.of_figures({"student": {"loss": 2.0}}, "loss", False, 0, [], [], []) == []


@pytest.mark.parametrize("value", [0.7, 0.6])
def test_a_teacher_that_is_no_better_than_the_baseline(value):
    (line,) = found({"teacher": {"accuracy": value}})
    assert line.startswith("teacher is no better than baseline") and "nothing to distil" in line


def test_distillation_that_did_not_help():
    (line,) = found({"student": {"loss": 0.6}}, primary="loss", larger=False)
    assert line == (
        "distillation did not help: student is no better than baseline (loss 0.6000 and 0.5000)"
    )


def test_a_uniform_guess():
    (line,) = found({"student": {"loss": math.log(2) * 0.995}})
    assert line.startswith("student has learnt nothing: its loss of 0.6897")
    assert found({"student": {"loss": math.log(2) * 0.98}}) == []


def test_the_most_frequent_class():
    lines = found({"teacher": {"accuracy": 0.75, "confusion": [[75, 0], [25, 0]]}})
    assert lines == [
        "teacher is no better than naming the most frequent class always (accuracy 0.7500 and "
        "0.7500)"
    ]


def at(kind, steps, **more):
    return schedules.learning_rate(
        ConfigDict({"learning_rate": 1e-3, "schedule": {"kind": kind, **more}}), steps
    )


def test_a_stage_shorter_than_its_warmup():
    (line,) = advice.of_schedule("student", at("linear", 10, warmup=100), 10)
    assert line.startswith("stage student: its 10 steps end while the learning rate still warms up")
    for kind, more in (("linear", {"warmup": 5}), ("constant", {}), ("one_cycle", {})):
        assert advice.of_schedule("student", at(kind, 10, **more), 10) == []


def test_a_stage_that_stopped_early():
    rate = at("linear", 100)
    assert advice.of_end("student", rate, 100, 100, 80, 3) == []
    (line,) = advice.of_end("student", rate, 50, 100, 20, 3)
    assert line.startswith(
        "stage student stopped after 50 of 100 steps: 3 evaluations were no better than that of "
        "step 20; the learning rate was at 50% of its peak: fewer steps"
    )
    (line,) = advice.of_end("student", rate, 90, 100, 60, 3)
    assert line.endswith("at 10% of its peak")
