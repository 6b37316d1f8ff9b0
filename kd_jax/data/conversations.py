"""Conversations: rows of `messages`, as chat datasets have them, checked.

A message is a dict with `role` (system, user, assistant or tool) and `content`, a text, which may
be missing beside `tool_calls`. What a template needs beside these (names, thoughts) is kept. The
column `tools`, where there is one, has the JSON schemas of the functions that may be called: a list
of them, or its JSON text.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from kd_jax.data import files
from kd_jax.data.table import Table
from kd_jax.errors import UserError

ROLES = ("system", "user", "assistant", "tool")
Message = dict[str, Any]
Conversation = list[Message]
Tools = list[dict[str, Any]]


def read(table: Table, column: str, key: str) -> list[Conversation]:
    """The conversations of a table's column; `key` is the config key that names it.

    Raises UserError naming the first row that holds no list of messages, an unknown role, a
    content that is no text, or no message of an assistant.
    """
    return [_check(value, table.place(i)) for i, value in enumerate(table.column(column, key))]


def tools(table: Table) -> list[Tools | None]:
    """The tools of each conversation. UserError names the first row with something else."""
    found = []
    for i, value in enumerate(table.columns.get("tools", [None] * len(table))):
        place = f"{table.place(i)}, tools"
        value = files.parse(value, place) if isinstance(value, str) and value.strip() else value
        if value and not (isinstance(value, list) and all(isinstance(v, dict) for v in value)):
            raise UserError(f"{place}: want a list of JSON schemas, not {value!r:.60}")
        found.append(value or None)
    return found


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
    if all(message["role"] != "assistant" for message in found):
        raise UserError(f"{place}: no message is an assistant's, so there is nothing to learn")
    return found


def _check_calls(calls: Any, place: str) -> None:
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UserError(f"{place}: {call!r:.60} in tool_calls is no call of a named function")


def digest(conversations: Sequence[Conversation], tools: Sequence[Tools | None] = ()) -> str:
    """A hash of all conversations, and their tools, in their order."""
    found = hashlib.blake2b(digest_size=16)
    for part in (*conversations, *([tools] if any(tools) else [])):
        line = json.dumps(part, ensure_ascii=False, sort_keys=True, default=str).encode()
        found.update(len(line).to_bytes(8, "little"))
        found.update(line)
    return found.hexdigest()
