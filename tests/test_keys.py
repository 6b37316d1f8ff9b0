"""Keys on the command line, which the config file may lack."""

from pathlib import Path

import pytest
from ml_collections import ConfigDict

from kd_jax import config as common
from kd_jax import keys


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
    left, values = keys.taken(found, [*arguments])
    keys.put(found, values)
    return found, left


def test_keys_that_the_file_lacks():
    found, left = set_by(
        "main",
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
    )
    assert left == ["main", "--config.steps=4"]  # what the file has is for ml_collections
    assert found.student.architecture.num_hidden_layers == 3
    assert found.objective.hidden.to_dict() == dict(weight=1.0, layers="uniform")
    assert found.objective.ce.to_dict() == dict(weight=1.0, positions="all")
    assert found.stages.student.to_dict() == dict(steps=500, optim=dict(learning_rate=1e-4))
    assert found.teachers.second.to_dict() == common.teacher("bert").to_dict()
    assert found.teacher.labels == ("negative", "positive")
    assert found.is_locked


def test_a_list_may_be_given_one_by_one():
    found, _ = set_by("--config.teacher.labels=a", "--config.teacher.labels=b")
    assert found.teacher.labels == ("a", "b")


@pytest.mark.parametrize(
    "key",
    ["optim.rate", "batchsize", "rounds", "optim.beta1.x", "objective.ce.temp", "teachr.model"],
)
def test_keys_that_are_none_are_left_to_be_refused(key):
    argument = f"--config.{key}=1"
    assert keys.taken(made(), [argument]) == ([argument], {})


def test_the_keys_and_their_page_are_one(capsys, monkeypatch):
    page = keys.page()
    assert (Path(__file__).parents[1] / "docs" / "config.md").read_text() == page
    assert "- `beta2` = `0.999` (at least 0 and below 1): of AdamW" in page
    assert "- `precision` = `bf16` (fp32 | bf16): of products" in page
    monkeypatch.setattr(keys.sys, "argv", ["kd-jax keys", "mesh"])
    keys.main()
    assert capsys.readouterr().out == f"## mesh\n\n- `fsdp` = `1` (at least 1): {FSDP}\n"


FSDP = common.SECTIONS["mesh"]["fsdp"][1]


def test_a_section_that_is_none(monkeypatch):
    monkeypatch.setattr(keys.sys, "argv", ["kd-jax keys", "optimm"])
    with pytest.raises(SystemExit, match="error: no section 'optimm'; have config, mesh, teacher"):
        keys.main()
