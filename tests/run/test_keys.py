"""The keys of training configs: ranges of the numbers, and teachers that nobody gave."""

import math
import re

import pytest
from ml_collections import ConfigDict

from kd_jax import config as common
from kd_jax.errors import UserError
from kd_jax.run import keys
from kd_jax.run.stage import read

OF_RECIPES = {
    "pretrain": lambda: common.base("pretrain"),
    "finetune": common.finetuning,
    "prune": common.pruning,
    "substitute": common.substitution,
    "ensemble": common.ensemble,
}


def numbers_of(config: ConfigDict, path: str = ""):
    """(dotted key, section, key) of every number, but those that others check."""
    for key in config:
        value = config[key]
        if isinstance(value, ConfigDict):
            yield from numbers_of(value, f"{path}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{path}{key}", config, key


@pytest.mark.parametrize("recipe", OF_RECIPES)
def test_no_number_of_a_recipe_is_without_a_range(recipe):
    config = OF_RECIPES[recipe]()
    config = ConfigDict(config.to_dict(), type_safe=False)
    config.task.name = "clm"
    config.teacher.model = config.student.model = "given"
    keys.check(config)
    found = [each for each in numbers_of(config) if each[0] not in ELSEWHERE]
    assert len(found) > 15
    for name, section, key in found:
        before = section[key]
        for bad in (-1, math.nan if isinstance(before, float) else 10**20):
            section[key] = bad
            with pytest.raises(UserError, match=re.escape(f"config.{name}={bad}")):
                keys.check(config)
        section[key] = before


ELSEWHERE = ("optim.schedule.warmup", "theseus.rate")  # tests/test_schedules.py


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("optim.clip_norm", -1.0, "config.optim.clip_norm=-1.0 must be at least 0"),
        ("optim.beta2", 2.0, "config.optim.beta2=2.0 must be at least 0 and below 1"),
        ("optim.epsilon", 0.0, "config.optim.epsilon=0.0 must be at least 1e-30"),
        ("seed", 99999999999999999999, "config.seed=99999999999999999999 must be"),
        (
            "batch_size",
            10_000_000,
            "config.batch_size=10000000 must be at least 1 and at most 10485",
        ),
        (
            "stages.student.optim.learning_rate",
            -1.0,
            "stages.student.optim.learning_rate=-1.0 must",
        ),
        ("stages.student.batch_size", 0, "config.stages.student.batch_size=0 must be at least 1"),
        ("stages.student.steps", 2**40, "config.stages.student.steps=1099511627776 must be"),
    ],
)
def test_numbers_that_trained_in_the_wrong_direction(key, value, says):
    config = ConfigDict(common.base("pretrain").to_dict(), type_safe=False)
    config.teacher.model = "given"
    config.stages = ConfigDict(dict(student=dict(optim={})), type_safe=False)
    section = config
    *path, last = key.split(".")
    for part in path:
        section = section[part]
    section[last] = value
    with pytest.raises(UserError, match=re.escape(says)):
        keys.check(config)
        read(config, ("teacher",))


def with_teacher(**changes) -> ConfigDict:
    config = common.finetuning()
    config.stages = ConfigDict(dict(student={}))
    config.teacher.model = "given"
    config.teachers.other = common.teacher("given")
    config.teachers.other.update(changes)
    return config


@pytest.mark.parametrize("name", ["teacher", "other"])
def test_a_forgotten_teacher_is_an_error(name):
    config = with_teacher()
    section = config.teacher if name == "teacher" else config.teachers.other
    keys.check(config)
    section.model = ""
    with pytest.raises(UserError, match=f"{name}.model is empty and no stage trains the {name}"):
        keys.check(config)
    section.init = "scratch"
    keys.check(config)
    section.init = ""
    config.stages = ConfigDict({name: {}, "student": {}})
    keys.check(config)


def test_a_teacher_begins_with_nothing_else():
    with pytest.raises(UserError, match="config.teachers.other.init='model': have scratch"):
        keys.check(with_teacher(init="model"))
