"""The keys of training configs: ranges, what earlier runs lack, teachers that nobody gave."""

import math
import re

import pytest
from ml_collections import ConfigDict

from kd_jax import config as common
from kd_jax.errors import UserError
from kd_jax.ranges import settings
from kd_jax.run.settings import read

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
    common.check(config)
    found = [each for each in numbers_of(config) if each[0] not in ELSEWHERE]
    assert len(found) > 15
    for name, section, key in found:
        before = section[key]
        for bad in (-1, math.nan if isinstance(before, float) else 10**20):
            section[key] = bad
            with pytest.raises(UserError, match=re.escape(f"config.{name}={bad}")):
                common.check(config)
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
        common.check(config)
        read(config, ("teacher",))


def earlier(**changes) -> dict:
    """A config as a run had it before teachers could be random on purpose, and before embedders."""
    config = with_teacher(**changes).to_dict()
    of_teachers = config["teacher"], config["teachers"]["other"]
    for section in (*of_teachers, config["student"], config["assistant"]):
        del section["embedding"]
    for section in of_teachers:
        del section["init"]
    return config


def test_the_config_of_an_earlier_run_is_read_with_the_keys_that_are_new():
    with pytest.raises(UserError, match="config: config.teacher.embedding, config.teacher.init"):
        common.check(ConfigDict(earlier()))
    found = common.complete(earlier())
    common.check(ConfigDict(found))
    assert found == with_teacher().to_dict()
    assert common.reduce(with_teacher().to_dict()) == earlier()


def test_no_new_key_is_dropped_where_it_says_something():
    config = with_teacher(init="scratch").to_dict()
    assert common.reduce(config)["teachers"]["other"]["init"] == "scratch"


def test_other_keys_are_never_made_up():
    config = earlier()
    del config["eval"]["batch_size"]
    with pytest.raises(UserError, match="missing from the config: config.eval.batch_size"):
        common.check(ConfigDict(common.complete(config)))


def test_every_key_has_a_meaning_and_a_default():
    for name, keys in {"": common.RUN | common.MORE, **common.SECTIONS}.items():
        filled = settings(None, common.ranges(keys), name)
        assert list(filled) == list(keys) and all(meaning for _, meaning in keys.values()), name
        assert settings(filled, common.ranges(keys), name) == filled


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
    common.check(config)
    section.model = ""
    with pytest.raises(UserError, match=f"{name}.model is empty and no stage trains the {name}"):
        common.check(config)
    section.init = "scratch"
    common.check(config)
    section.init = ""
    config.stages = ConfigDict({name: {}, "student": {}})
    common.check(config)


def test_a_teacher_begins_with_nothing_else():
    with pytest.raises(UserError, match="config.teachers.other.init='model': have scratch"):
        common.check(with_teacher(init="model"))
