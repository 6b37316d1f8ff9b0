"""Reads conversations, lists of `messages` as in chat datasets, and checks them.

A message is a dict with `role` (system, user, assistant or tool) and `content`, a text, which may
be missing if there are `tool_calls`. Other keys that a template needs (names, thoughts) are kept.
The optional column `tools` has the JSON schemas of the functions that may be called: a list of
them, or its JSON text.
"""

import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from kd_jax.data import files
from kd_jax.data.identity import Identity
from kd_jax.errors import UserError

ROLES = ("system", "user", "assistant", "tool")
Message = dict[str, Any]
Conversation = list[Message]
Tools = list[dict[str, Any]]

_IN_MEMORY = 64_000_000  # bytes of tools that are hashed without a file


class Row(NamedTuple):
    """A conversation of a source."""

    place: str  # where it stands, for messages
    messages: Conversation
    tools: Tools | None = None


def read(rows: Iterable[tuple[str, dict]], column: str, key: str) -> Iterator[Row]:
    """Reads the conversations in a column of (place, row) pairs, one after the other; `key` is the
    config key that names the column.

    Raises UserError naming the first row that holds no list of messages, an unknown role, a
    content that is no text, no message of an assistant, or tools that are no JSON schemas.
    """
    for row in _read(rows, column, key):
        if all(message["role"] != "assistant" for message in row.messages):
            raise UserError(
                f"{row.place}: no message is an assistant's, so there is nothing to learn"
            )
        yield row


def asked(rows: Iterable[tuple[str, dict]], column: str, key: str) -> Iterator[Row]:
    """Reads, as `read`, conversations that an assistant is to answer: an answer that is there at
    the end is left out. UserError names the first one in which nothing else is left."""
    for row in _read(rows, column, key):
        messages = row.messages
        while messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        if not messages:
            raise UserError(f"{row.place}: there is no message before the assistant's")
        yield row._replace(messages=messages)


def _read(rows: Iterable[tuple[str, dict]], column: str, key: str) -> Iterator[Row]:
    for place, row in rows:
        if column not in row:
            raise UserError(f"{place}: no column {column!r}; set {key} to one of: {', '.join(row)}")
        yield Row(place, _check(row[column], place), _tools(row.get("tools"), f"{place}, tools"))


def _tools(value: Any, place: str) -> Tools | None:
    value = files.parse(value, place) if isinstance(value, str) and value.strip() else value
    if value and not (isinstance(value, list) and all(isinstance(v, dict) for v in value)):
        raise UserError(f"{place}: want a list of JSON schemas, not {value!r:.60}")
    return value or None


def _check(messages: Any, place: str) -> Conversation:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise UserError(f"{place}: {messages!r:.60} is no list of messages")
    found = []
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise UserError(f"{place}, message {i}: want a role and a content, not {message!r:.60}")
        # In some files every message has every key, null where there is nothing.
        message = {key: value for key, value in message.items() if value is not None}
        if message.get("tool_calls"):
            _check_calls(message["tool_calls"], f"{place}, message {i}")
            message.setdefault("content", "")
        found.append(message)
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise UserError(f"{place}, message {i}: role {role!r}; have: {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise UserError(f"{place}, message {i}: content should be text, not {content!r:.60}")
    return found


def _check_calls(calls: Any, place: str) -> None:
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UserError(f"{place}: {call!r:.60} in tool_calls is no call of a named function")


def identity(rows: Iterable[Row]) -> Identity:
    """Hashes and counts conversations, with their tools, in their order."""
    found, count, any_tools = hashlib.blake2b(digest_size=16), 0, False
    # The tools are hashed behind all conversations, as one list, if there are any.
    with tempfile.SpooledTemporaryFile(_IN_MEMORY) as listed:
        for row in rows:
            line = _json(row.messages)
            found.update(len(line).to_bytes(8, "little"))
            found.update(line)
            listed.write((b", " if count else b"[") + _json(row.tools))
            count, any_tools = count + 1, any_tools or row.tools is not None
        if any_tools:
            found.update((listed.tell() + 1).to_bytes(8, "little"))
            listed.seek(0)
            for part in iter(lambda: listed.read(2**20), b""):
                found.update(part)
            found.update(b"]")
    return Identity(found.hexdigest(), count)


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, default=str).encode()
