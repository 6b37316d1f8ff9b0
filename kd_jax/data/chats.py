"""Tokenizes conversations (data/messages.py) by the tokenizer's chat template.

Only the assistant's tokens are learned: whatever the template shows of its message after the
generation prompt (thoughts, content, tool calls), and the special token that ends its turn. The
template's other words, the tools and all other messages are not. The tokens are those that a chat
program makes: the template's special tokens become single tokens, and the text between them is
tokenized, separately from where an assistant begins to write. A special token's name inside a
content stays text, so that no message can end a turn.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from kd_jax.data.messages import Conversation, Message, Row, Tools
from kd_jax.errors import UserError

_PRIVATE = 0xF0000  # characters of Unicode's private use, which stand for messages
_MARK = chr(_PRIVATE)
_SLICE = 4_000_000  # characters tokenized at a time, on all cores: bounds the memory
# What an assistant may write besides its content.
_WRITTEN = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
_UNLIKE = (
    "the chat template begins or ends thoughts and tool calls unlike other answers, so that what "
    "of them is to be learned cannot be told: take another template, or leave them out"
)


@dataclasses.dataclass(frozen=True)
class Piece:
    """A piece of a conversation's text."""

    text: str
    special: bool  # one special token of the template, not text
    learned: bool


class Tokens(NamedTuple):
    """The tokens of a conversation, and which of them are learned."""

    ids_N: np.ndarray  # int32
    learned_N: np.ndarray  # bool


class Template:
    """The chat template of a tokenizer. Raises UserError where it has none."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, turns: str = "all"):
        """Chooses what is learned: `turns` "all" takes every message of the assistant, "last" only
        the last one."""
        if not tokenizer.chat_template:
            raise UserError(
                f"tokenizer {tokenizer.name_or_path!r} has no chat template: take the tokenizer "
                f"of a chat model, or put a chat_template.jinja next to it"
            )
        self.tokenizer = tokenizer
        self.turns = turns
        self._shows = functools.cache(self._probe)
        self._ids = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        self._ids |= {
            str(token): number
            for number, token in tokenizer.added_tokens_decoder.items()
            if token.special
        }
        longest_first = sorted(self._ids, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)))
        self._plain = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._plain.no_truncation()
        self._plain.no_padding()
        self._plain.encode_special_tokens = True  # their names are text like any other

    def pieces(self, messages: Conversation, tools: Tools | None = None) -> list[Piece]:
        """Cuts a conversation into pieces that are tokenized one by one.

        Raises UserError where the template does not show the messages, or tools, as they are.
        """
        shown, words = self._shown(messages, tools)
        speaks = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        learned = {i: messages[i] for i in (speaks if self.turns == "all" else speaks[-1:])}
        found = []
        for i, between in enumerate(words):
            found += self._between(between, learned.get(i - 1), learned.get(i))
            found += [Piece(content, False, i in learned) for content in shown[i : i + 1]]
        return _joined(found)

    def prompt(self, messages: Conversation, tools: Tools | None = None) -> list[Piece]:
        """Cuts a conversation and the template's prompt for an answer into pieces."""
        whole = self._render(messages, tools)
        asking = self._render(messages, tools, add_generation_prompt=True)
        more = asking.removeprefix(whole) if asking.startswith(whole) else ""
        pieces = [*self.pieces(messages, tools), *self._split(more or self._turn[0], False)]
        return _joined([dataclasses.replace(piece, learned=False) for piece in pieces])

    def encode(
        self, rows: Iterable[Row], cut: Callable[..., list[Piece]] | None = None
    ) -> Iterator[list[Tokens]]:
        """Tokenizes conversations, some megabytes of text at a time; `cut`: `pieces`, or `prompt`.
        UserError names the place of one that the template refuses."""
        cut, pieces, size = cut or self.pieces, [], 0
        for row in rows:
            try:
                pieces.append(cut(row.messages, row.tools))
            except UserError as error:
                raise UserError(f"{row.place}: {error}") from None
            size += sum(len(piece.text) for piece in pieces[-1])
            if size >= _SLICE:
                yield self._encode(pieces)
                pieces, size = [], 0
        if pieces:
            yield self._encode(pieces)

    def _encode(self, pieces: list[list[Piece]]) -> list[Tokens]:
        texts = [piece.text for each in pieces for piece in each if not piece.special]
        encoded = iter(self._plain.encode_batch_fast(texts, add_special_tokens=False))
        found = []
        for each in pieces:
            ids = [
                [self._ids[piece.text]] if piece.special else next(encoded).ids for piece in each
            ]
            lengths = [len(part) for part in ids]
            learned = np.repeat([piece.learned for piece in each], lengths)
            found.append(
                Tokens(np.concatenate([np.array(part, np.int32) for part in ids]), learned)
            )
        return found

    def _between(self, words: str, after: Message | None, before: Message | None) -> list[Piece]:
        """Cuts the template's words between two messages; a message is None if not learned."""
        ends = 0 if after is None else self._ends(words, after)
        begins = len(words) if before is None else self._begins(words, ends, before)
        parts = (words[:ends], True), (words[ends:begins], False), (words[begins:], True)
        return [piece for text, learned in parts for piece in self._split(text, learned)]

    def _begins(self, words: str, ends: int, message: Message) -> int:
        """Finds where the assistant begins to write, in the template's words before its message
        (from index `ends` on)."""
        prompt, _ = self._turn
        if prompt and (at := words.rfind(prompt, ends)) >= 0:
            return at + len(prompt)
        thoughts = [message[field] for field in _WRITTEN[1:] if isinstance(message.get(field), str)]
        if _is_call(message) or any(text.strip() in words for text in thoughts):
            raise UserError(_UNLIKE)
        return len(words)

    def _ends(self, words: str, message: Message) -> int:
        """Finds where the assistant's turn ends, in the template's words behind its message: after
        the special token that follows its content or tool calls."""
        if not message.get("tool_calls"):
            return len(_first(self._special, words))
        _, end = self._turn
        if not end or end not in words:
            raise UserError(_UNLIKE)
        return words.index(end) + len(end)

    def _split(self, words: str, learned: bool) -> Iterator[Piece]:
        at = 0
        for match in self._special.finditer(words):
            yield Piece(words[at : match.start()], False, learned)
            yield Piece(match[0], True, learned)
            at = match.end()
        yield Piece(words[at:], False, learned)

    @property
    def end_of_turn(self) -> int:
        """Returns the special token behind an assistant's message. Raises UserError where the
        template has none."""
        _, end = self._turn
        if not end:
            raise UserError("the chat template ends an assistant's turn with no special token")
        return self._ids[end]

    @functools.cached_property
    def _turn(self) -> tuple[str, str]:
        """Finds the prompt before an assistant's message, and the special token behind the message;
        "" where unknown.

        The prompt is the template's generation prompt; where it has none, the words before a
        user's message with "assistant" in place of "user"; or else the words between the two.
        """
        asked, answer = {"role": "user", "content": _MARK}, {"role": "assistant", "content": _MARK}
        try:
            before, between, after = self._render([asked, answer]).split(_MARK)
            plain = self._render([asked])
            prompt = self._render([asked], add_generation_prompt=True).removeprefix(plain)
        except (UserError, ValueError):
            return "", ""
        if not prompt:
            mine, other = (
                words[max([match.start() for match in self._special.finditer(words)], default=0) :]
                for words in (before, between)
            )
            mine = mine.replace("user", "assistant") if "user" in mine else ""
            prompt = mine or other.rstrip(" ")  # which may be there or not
        return prompt, _first(self._special, after).strip()

    def _probe(self, field: str) -> bool:
        """Tells whether the template shows a field of an assistant's message, by trying it out."""
        call = {"id": "123456789", "type": "function", "function": {"name": _MARK, "arguments": {}}}
        answer = {"role": "assistant", "content": "b"}
        answer[field] = [call] if field == "tool_calls" else _MARK
        with contextlib.suppress(UserError):
            return _MARK in self._render([{"role": "user", "content": "a"}, answer])
        return True  # what it says of the messages themselves tells more

    def _shown(self, messages: Conversation, tools: Tools | None) -> tuple[list[str], list[str]]:
        """Splits a rendered conversation into the messages' texts (exact, or stripped of white
        space at their ends) and the template's words before, between and after them."""
        whole = self._render(messages, tools)
        self._check_rest(messages, tools, whole)
        texts = [_text(message) for message in messages]
        used = set().union(*_strings([messages, tools]))
        unused = (char for char in map(chr, itertools.count(_PRIVATE)) if char not in used)
        marks = list(itertools.islice(unused, len(messages)))
        marked = self._render(list(map(_with_text, messages, marks)), tools)
        if [char for char in marked if char in marks] != marks:
            raise UserError(
                "the chat template does not show every message once and in order: leave out the "
                "messages that it drops or moves"
            )
        for shown in (texts, [text.strip() for text in texts]):
            table = {ord(mark): text for mark, text in zip(marks, shown, strict=True)}
            if marked.translate(table) == whole:
                return shown, re.split(f"[{''.join(marks)}]", marked)
        raise UserError(
            "the chat template writes something else than the messages' contents: give it "
            "messages that it leaves as they are, with thoughts in `reasoning_content`"
        )

    def _check_rest(self, messages: Conversation, tools: Tools | None, whole: str) -> None:
        """Raises UserError where the template leaves out the tools or some of an assistant's
        message, and where any text other than a content would become a special token."""
        if tools and whole == self._render(messages):
            raise UserError("the chat template does not show the tools: take one that does")
        for i, message in enumerate(messages):
            for field in _WRITTEN if message["role"] == "assistant" else ():
                if message.get(field) and not self._shows(field):
                    raise UserError(
                        f"message {i}: the chat template does not show its {field}: take a "
                        f"template that does, or leave the field out"
                    )
        rest = [{**message, "content": ""} for message in messages]
        for text in _strings([rest, tools]):
            name = self._special.search(text)
            forms = text, json.dumps(text, ensure_ascii=False)[1:-1]
            if name and name[0] and any(form in whole for form in forms):
                raise UserError(
                    f"the special token {name[0]!r} stands in {text!r:.60}, where only a content "
                    f"may have its name: remove it"
                )

    def _render(
        self,
        messages: Conversation,
        tools: Tools | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                messages, tools, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # a template is a program
            raise UserError(f"the chat template refuses the conversation: {error}") from None


def _first(special: re.Pattern, words: str) -> str:
    """Finds the special token at the start of some words, after any white space; else ""."""
    match = special.search(words)
    return words[: match.end()] if match and not words[: match.start()].strip() else ""


def _is_call(message: Message) -> bool:
    """Tells whether a message has tool calls and no content."""
    return not message["content"] and bool(message.get("tool_calls"))


def _text(message: Message) -> str:
    """Returns the text by which a message is found in the rendered conversation: its content, or
    the name of its first tool call."""
    if not _is_call(message):
        return message["content"]
    call = message["tool_calls"][0]
    return call.get("function", call)["name"]


def _with_text(message: Message, text: str) -> Message:
    """Replaces the text by which a message is found, see `_text`."""
    if not _is_call(message):
        return {**message, "content": text}
    call, *others = message["tool_calls"]
    named = {**call.get("function", call), "name": text}
    call = {**call, "function": named} if "function" in call else named
    return {**message, "tool_calls": [call, *others]}


def _strings(value: Any) -> Iterator[str]:
    """Lists all strings in nested lists and dicts, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple | dict):
        for part in (*value, *value.values()) if isinstance(value, dict) else value:
            yield from _strings(part)


def _joined(pieces: Sequence[Piece]) -> list[Piece]:
    """Joins neighboring pieces of text, and drops empty ones."""
    found: list[Piece] = []
    for piece in pieces:
        last = found[-1] if found else None
        if last and not (last.special or piece.special) and last.learned == piece.learned:
            found[-1] = Piece(last.text + piece.text, False, piece.learned)
        elif piece.text:
            found.append(piece)
    return found
