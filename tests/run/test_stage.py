"""The stages of a config: which there are, in which order, with which settings."""

import pytest
from ml_collections import ConfigDict

from kd_jax import config as defaults
from kd_jax.errors import UserError
from kd_jax.run.settings import read


def config(recipe, **stages):
    c = defaults.finetuning() if recipe == "finetune" else defaults.base(recipe)
    c.stages = ConfigDict(stages)
    return c


def test_stages_go_in_their_order_however_they_are_written():
    c = config(
        "finetune", student={}, intermediate={}, other={}, mine={"kind": "plain"}, teacher={}
    )
    c.teachers.other = defaults.teacher("somewhere")
    found = {each.name: each for each in read(c, ("teacher", "other"))}
    assert list(found) == ["teacher", "other", "intermediate", "student", "mine"]
    assert [each.model for each in found.values()] == ["teacher", "other", *["student"] * 3]
    terms = [each.objective for each in found.values()]
    assert terms == ["", "", "intermediate", "objective", "objective"]
    assert [name for name, each in found.items() if each.after] == ["student"]
    assert [name for name, each in found.items() if not each.select] == ["intermediate"]


def test_a_stage_comes_after_what_it_needs():
    c = config(
        "finetune",
        student=dict(after="warm"),
        baseline={},
        warm=dict(kind="plain", after="first"),
        first=dict(kind="plain"),
        other=dict(kind="plain", model="teacher", objective=""),
    )
    assert [each.name for each in read(c, ("teacher",))] == [
        *("other", "baseline", "first", "warm", "student")
    ]
    c.stages.student.after = "other"
    with pytest.raises(UserError, match="student.after='other', which trains teacher, and student"):
        read(c, ("teacher",))
    c.stages.student.after = "warm"
    c.stages.first = dict(kind="plain", after="student")
    with pytest.raises(UserError, match="config.stages: student, first, warm go on from each oth"):
        read(c, ("teacher",))


def test_a_stage_says_what_differs_there():
    c = config("pretrain", student=dict(steps=7, objective="", optim=dict(clip_norm=2.0)))
    (found,) = read(c, ("teacher",))
    assert (found.steps, found.objective, found.kind) == (7, "", "plain")
    assert found.batch_size == c.batch_size and found.optim.beta1 == c.optim.beta1
    assert found.optim.clip_norm == 2.0 != c.optim.clip_norm


@pytest.mark.parametrize(
    ("recipe", "have"),
    [
        ("pretrain", "have teacher, baseline, student; of others"),
        (
            "finetune",
            "have teacher, assistant, baseline, intermediate, theseus, student; of others",
        ),
    ],
)
def test_a_stage_whose_section_is_missing_is_none(recipe, have):
    with pytest.raises(UserError, match=have):
        read(config(recipe, prune={}), ("teacher",))
    with pytest.raises(UserError, match=have):
        read(config(recipe), ("teacher",))
