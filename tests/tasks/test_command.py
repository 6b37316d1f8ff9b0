"""Tasks by the names that command lines give them."""

import json

import pytest

from kd_jax.errors import UserError
from kd_jax.tasks import command


def test_a_name_is_a_task_and_perhaps_its_variant():
    assert command.config("glue/mnli_mismatched", {}) == {"name": "glue", "task": "mnli_mismatched"}
    assert command.config("phrasebank/50Agree", {}) == {"name": "phrasebank", "level": "50Agree"}
    assert command.config("cbt/NE", {}) == {"name": "cbt", "classes": ("NE",)}
    assert command.config("cbt", {}) == {"name": "cbt"}
    assert {"glue/TASK", "phrasebank/LEVEL", "cbt", "cbt/CLASSES", "text"} <= set(command.names())
    assert not {"glue", "labelled_text"} & set(command.names(variants=True))


def test_a_task_takes_the_flags_that_it_reads():
    flags = dict(text="t", pair="b", label=None, seq_len=9, teacher="x")
    own = {"text": "t", "pair": "b"}
    assert command.config("text", flags) == {"name": "labelled_text"} | own
    assert command.config("agnews", flags) == {"name": "agnews"}
    assert command.config("chat", flags) == {"name": "chat", "column": "t", "seq_len": 9}
    assert command.config("clm", flags) == {"name": "clm", "seq_len": 9}
    assert command.source(command.find("clm"), "a.csv", "t")["text"] == "t"
    assert "text" not in command.source(command.find("chat"), "a.jsonl", "t")
    for name, flag in (("hellaswag", "stride"), ("mlm", "separator")):
        with pytest.raises(UserError, match=f"unknown key config.task.{flag}"):
            command.build(name, command.config(name, {flag: 2}), None)


def test_where_one_split_is_all_there_is(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"text": t, "label": t[0]}) for t in ("a x", "b y")))
    made = command.build("text", {"labels": None}, {"path": str(file)})
    assert made.labels == ("a", "b") and made.splits == ("train", "validation", "test")
    assert command.build("text", {"labels": ("b", "a")}, {"path": str(file)}).splits == ("test",)
    for given, threshold in (
        ({}, 0.0),
        ({"null_threshold": None}, 0.0),
        ({"null_threshold": 2.0}, 2.0),
    ):
        assert command.build("squad", given, {"path": "x.json"}).threshold == threshold
    with pytest.raises(UserError, match="--task=text needs --data, a local file or folder"):
        command.build("text", {}, None)
