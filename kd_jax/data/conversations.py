"""Conversations: rows of `messages`, as chat datasets have them, checked.

A message is a dict with `role` (system, user, assistant or tool) and `content`, a text. What a
template needs beside these (names, tool calls) is kept.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from kd_jax.data.table import Table
from kd_jax.errors import UserError

ROLES = ("system", "user", "assistant", "tool")
Message = dict[str, Any]
Conversation = list[Message]


def read(table: Table, column: str, key: str) -> list[Conversation]:
    """The conversations of a table's column; `key` is the config key that names it.

    Raises UserError naming the first row that holds no list of messages, an unknown role, a
    content that is no text, or no message of an assistant.
    """
    return [_check(value, table.place(i)) for i, value in enumerate(table.column(column, key))]


def _check(messages: Any, place: str) -> Conversation:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise UserError(f"{place}: {messages!r:.60} is no list of messages")
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise UserError(f"{place}, message {i}: want a role and a content, not {message!r:.60}")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise UserError(f"{place}, message {i}: role {role!r}; have: {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise UserError(f"{place}, message {i}: content should be text, not {content!r:.60}")
    if all(message["role"] != "assistant" for message in messages):
        raise UserError(f"{place}: no message is an assistant's, so there is nothing to learn")
    return list(messages)


def digest(conversations: Sequence[Conversation]) -> str:
    """A hash of all conversations, in their order."""
    found = hashlib.blake2b(digest_size=16)
    for messages in conversations:
        line = json.dumps(messages, ensure_ascii=False, sort_keys=True).encode()
        found.update(len(line).to_bytes(8, "little"))
        found.update(line)
    return found.hexdigest()
