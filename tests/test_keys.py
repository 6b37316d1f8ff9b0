"""Keys on the command line, which the config file may lack."""

from pathlib import Path

import pytest
from ml_collections import ConfigDict

from kd_jax import config as common
from kd_jax import keys
from kd_jax.errors import UserError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("-1e-3", -1e-3),
        ("true", True),
        ("False", False),
        ("0,2,4", (0, 2, 4)),
        ("[0, 2]", [0, 2]),
        ("a,b", ["a", "b"]),
        ("[a, 1]", ["a", 1]),
        ("runs/teacher", "runs/teacher"),
        ("'1.0'", "1.0"),
        ("", ""),
    ],
)
def test_values_without_python(text, value):
    assert keys.value_of(text) == value
    assert type(keys.value_of(text)) is type(value)


def made() -> ConfigDict:
    c = common.finetuning()
    c.objective = dict(ce=dict(weight=1.0))
    c.stages = dict(teacher=dict(), student=dict())
    c.task = dict(name="glue", task="sst2")
    return c.lock()


def set_by(*arguments: str) -> tuple[ConfigDict, list[str]]:
    found = made()
    left, changes = keys.taken(arguments)
    keys.change(found, changes)
    return found, left


def test_keys_that_the_file_has_and_keys_that_it_lacks():
    found, left = set_by(
        "--workdir=here",
        "--config.student.architecture.num_hidden_layers=3",
        "--config.objective.hidden.weight=1.0",
        "--config.objective.hidden.layers",
        "uniform",
        "--config.objective.ce.positions=all",
        "--config.stages.student.steps=500",
        "--config.stages.student.optim.learning_rate=1e-4",
        "--config.teachers.second.model=bert",
        "--config.teacher.labels=negative,positive",
        "--config.steps=4",
        "--config.epochs=4",
        "--config.remat",
        "--config.student.layers=0,2",
        "--config.teacher.revision=1",
        "--config",
        "x.py",
    )
    assert left == ["--workdir=here", "--config", "x.py"]
    assert found.student.architecture.num_hidden_layers == 3
    assert found.objective.hidden.to_dict() == dict(weight=1.0, layers="uniform")
    assert found.objective.ce.to_dict() == dict(weight=1.0, positions="all")
    assert found.stages.student.to_dict() == dict(steps=500, optim=dict(learning_rate=1e-4))
    assert found.teachers.second.to_dict() == common.teacher("bert").to_dict()
    assert found.teacher.labels == ("negative", "positive")
    assert (found.steps, found.remat, found.student.layers) == (4, True, (0, 2))
    assert type(found.epochs) is float and found.teacher.revision == "1"  # as their types are
    assert found.is_locked


def test_a_section_that_the_file_lacks():
    found = common.base("pretrain").lock()
    keys.change(found, [("cache.logits", "all")])
    assert found.cache.to_dict() == dict(logits="all")
    found.teacher.model = "given"
    common.check(found)
    with pytest.raises(UserError, match="config: no key 'cost.repeats'"):
        keys.change(found, [("cost.repeats", "2")])


def test_a_list_may_be_given_one_by_one():
    found, _ = set_by("--config.teacher.labels=a", "--config.teacher.labels=b")
    assert found.teacher.labels == ("a", "b")


def test_a_whole_section():
    found, _ = set_by("--config.stages={'student': {'steps': 3}}")
    assert found.stages.to_dict() == {"student": {"steps": 3}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "optim.rate=1",
            "no key 'optim.rate' .*; config.optim has beta1, beta2, clip_norm, epsilon",
        ),
        ("batchsize=1", "no key 'batchsize' .did you mean --config.batch_size"),
        ("rounds=1", "no key 'rounds'"),
        ("optim.beta1.x=1", "no key 'optim.beta1.x'; config.optim.beta1 has no keys"),
        ("teachr.model=1", "no key 'teachr.model' .did you mean --config.teacher.model or"),
        ("steps=many", "--config.steps=many should be a whole number"),
        ("steps=1.5", "--config.steps=1.5 should be a whole number"),
        ("epochs=many", "--config.epochs=many should be a number"),
        ("remat=2", "--config.remat=2 should be True or False"),
        ("optim=adam", "--config.optim=adam: a section; set its keys, one by one"),
    ],
)
def test_keys_and_values_that_are_none(change, message):
    with pytest.raises(UserError, match=message):
        set_by(f"--config.{change}")


def test_the_keys_and_their_page_are_one(capsys, monkeypatch):
    page = keys.page()
    assert (Path(__file__).parents[1] / "docs" / "config.md").read_text() == page
    assert "- `beta2` = `0.999` (at least 0 and below 1): of AdamW" in page
    assert "- `precision` = `bf16` (fp32 | bf16): of products" in page
    monkeypatch.setattr(keys.sys, "argv", ["kd-jax keys", "mesh"])
    keys.main()
    assert capsys.readouterr().out.startswith(f"## mesh\n\n- `fsdp` = `1` (at least 1): {FSDP}\n- ")


FSDP = common.SECTIONS["mesh"]["fsdp"][1]


def test_a_section_that_is_none(monkeypatch):
    monkeypatch.setattr(keys.sys, "argv", ["kd-jax keys", "optimm"])
    with pytest.raises(SystemExit, match="error: no section 'optimm'; have config, mesh, teacher"):
        keys.main()
