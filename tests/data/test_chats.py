"""Rows of messages that are no conversations are refused, by name of the row."""

import datetime
import hashlib
import json

import pytest

from kd_jax.data import messages
from kd_jax.errors import UserError

ASKED = {"role": "user", "content": "2 + 2?"}
ANSWERED = {"role": "assistant", "content": "4"}


def table(column, *values):
    return [(f"chats.jsonl, row {i}", {column: value}) for i, value in enumerate(values, 1)]


def read(*rows):
    found = messages.read(table("messages", *rows), "messages", "config.task.column")
    return [row.messages for row in found]


def digest(conversations, tools=None):
    pairs = zip(conversations, tools or [None] * len(conversations), strict=True)
    return messages.identity(messages.Row("", *pair) for pair in pairs).digest


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
    rows = table("messages", [ASKED, ANSWERED])
    with pytest.raises(UserError, match="row 1: no column 'chat'; set config.task.column to one"):
        list(messages.read(rows, "chat", "config.task.column"))


def test_the_digest_tells_order_and_words_apart():
    one, other = [ASKED, ANSWERED], [ASKED, ANSWERED, ASKED]
    found = {digest(rows) for rows in ([one, other], [other, one], [one], [one, one])}
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

    def tools(*values):
        said = [(place, row | {"messages": [ASKED, ANSWERED]}) for place, row in values]
        return [row.tools for row in messages.read(said, "messages", "config.task.column")]

    assert tools(*table("tools", *values)) == [[schema], [schema], None, None, None]
    assert tools(("no such column", {})) == [None]
    for value, message in [
        ("[", "row 1, tools is not JSON"),
        (["add"], "row 1, tools: want a list"),
    ]:
        with pytest.raises(UserError, match=message):
            tools(*table("tools", value))


def test_the_digest_tells_tools_apart_and_takes_dates():
    one = [ASKED, ANSWERED | {"at": datetime.date(2024, 1, 1)}]
    rows, tool = [one, one], [{"name": "add"}]
    given = ([None, None], [tool, None], [None, tool])
    assert len({digest(rows, tools) for tools in given}) == 3


@pytest.mark.parametrize("tools", [[None, None], [[{"name": "é"}], None]])
def test_the_digest_is_that_of_runs_before(tools, monkeypatch):
    """Which had it from lists in memory: their manifests and caches still agree."""
    rows = [[ASKED, ANSWERED], [ASKED, ANSWERED | {"content": "vier, é"}]]
    want = hashlib.blake2b(digest_size=16)
    for part in (*rows, *([tools] if any(tools) else [])):
        line = json.dumps(part, ensure_ascii=False, sort_keys=True, default=str).encode()
        want.update(len(line).to_bytes(8, "little"))
        want.update(line)
    monkeypatch.setattr(messages, "_IN_MEMORY", 5)
    assert digest(rows, tools) == want.hexdigest()
