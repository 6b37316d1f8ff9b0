"""Rows of messages that are no conversations are refused, by name of the row."""

import datetime
import json

import pytest

from kd_jax.data import chats
from kd_jax.data.source import Table
from kd_jax.errors import UserError

ASKED = {"role": "user", "content": "2 + 2?"}
ANSWERED = {"role": "assistant", "content": "4"}


def table(*rows):
    return Table("chats.jsonl", {"messages": list(rows)}, lambda i: f"chats.jsonl, row {i + 1}")


def read(*rows):
    return chats.read(table(*rows), "messages", "config.task.column")


def test_conversations_stay_as_they_are():
    assert read([ASKED, ANSWERED]) == [[ASKED, ANSWERED]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("a text", "row 2: 'a text' is no list of messages"),
        ([], "is no list of messages"),
        (["a text"], "row 2, message 0: want a role and a content, not 'a text'"),
        ([ASKED, ANSWERED | {"role": "bot"}], "message 1: role 'bot'; have: system, user"),
        ([ASKED, {"role": "assistant"}], "message 1: content should be text, not None"),
        ([ASKED], "row 2: no message is an assistant's"),
    ],
)
def test_a_row_that_is_none_is_named(row, message):
    with pytest.raises(UserError, match="^chats.jsonl, row 2") as error:
        read([ASKED, ANSWERED], row)
    assert message in str(error.value)


def test_a_missing_column():
    with pytest.raises(UserError, match="no column 'chat'; set config.task.column"):
        chats.read(table([ASKED, ANSWERED]), "chat", "config.task.column")


def test_the_digest_tells_order_and_words_apart():
    one, other = [ASKED, ANSWERED], [ASKED, ANSWERED, ASKED]
    found = {chats.digest(rows) for rows in ([one, other], [other, one], [one], [one, one])}
    assert len(found) == 4


CALL = {"function": {"name": "add", "arguments": {"a": 3}}}


def test_calls_need_no_content_and_nothing_is_left_of_null():
    said = {"role": "assistant", "content": None, "tool_calls": [CALL], "name": None}
    asked = ASKED | {"tool_calls": None}
    assert read([asked, said]) == [
        [ASKED, {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    ]
    for calls in ("add", [{"function": "add"}], [{"name": 1}]):
        with pytest.raises(
            UserError, match="row 1, message 1: .* in tool_calls is no call of a na"
        ):
            read([ASKED, ANSWERED | {"tool_calls": calls}])


def test_tools_are_lists_or_their_json():
    schema = {"type": "function", "function": {"name": "add"}}
    values = [[schema], json.dumps([schema]), None, "", []]
    with_tools = Table("t", {"tools": values}, lambda i: f"t, row {i + 1}")
    assert chats.tools(with_tools) == [[schema], [schema], None, None, None]
    assert chats.tools(table([ASKED], [ASKED])) == [None, None]
    for value, message in [
        ("[", "row 1, tools is not JSON"),
        (["add"], "row 1, tools: want a list"),
    ]:
        with pytest.raises(UserError, match=message):
            chats.tools(Table("t", {"tools": [value]}, lambda i: f"t, row {i + 1}"))


def test_the_digest_tells_tools_apart_and_takes_dates():
    one = [ASKED, ANSWERED | {"at": datetime.date(2024, 1, 1)}]
    rows, tool = [one, one], [{"name": "add"}]
    given = ([], [None, None], [tool, None], [None, tool])
    assert len({chats.digest(rows, tools) for tools in given}) == 3
