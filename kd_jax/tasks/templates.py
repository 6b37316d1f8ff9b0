"""Conversations as tokens, by the tokenizer's own chat template, and which tokens are learnt.

An assistant's message and the special token that ends its turn are learnt; the template's words and
all other messages are not. The tokens are those that a chat program makes: the template's special
tokens become themselves, and text is tokenised between them, begun anew where an assistant begins
to write. A special token's name inside a message stays text, so that nobody ends a turn from
within.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence

import jinja2
import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from kd_jax.data.conversations import Conversation
from kd_jax.errors import UserError

_PRIVATE = 0xF0000  # characters of Unicode's private use, which stand for messages


@dataclasses.dataclass(frozen=True)
class Piece:
    """A stretch of a conversation's text."""

    text: str
    special: bool  # one special token of the template, not text
    learnt: bool


@dataclasses.dataclass(frozen=True)
class Tokens:
    """A conversation's tokens, and which of them are learnt."""

    ids_N: np.ndarray  # int32
    learnt_N: np.ndarray  # bool


class Template:
    """The chat template of a tokenizer. Raises UserError where it has none."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, turns: str = "all"):
        """turns: "all" learns every message of the assistant, "last" the last one only."""
        if not tokenizer.chat_template:
            raise UserError(
                f"tokenizer {tokenizer.name_or_path!r} has no chat template: take the tokenizer "
                f"of a chat model, or put a chat_template.jinja beside it"
            )
        if turns not in ("all", "last"):
            raise UserError(f"turns={turns!r}; have: all, last")
        self.tokenizer = tokenizer
        self.turns = turns
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

    def pieces(self, messages: Conversation) -> list[Piece]:
        """The conversation in stretches that are tokenised one by one.

        Raises UserError where the template does not show the messages as they are.
        """
        contents, words = self._shown(messages)
        speaks = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        learnt = speaks if self.turns == "all" else speaks[-1:]
        found = self._words(words[0], ends=False)
        for i, (content, after) in enumerate(zip(contents, words[1:], strict=True)):
            found.append(Piece(content, False, i in learnt))
            found += self._words(after, ends=i in learnt)
        return _joined(found)

    def encode(
        self, conversations: Sequence[Conversation], place: Callable[[int], str]
    ) -> list[Tokens]:
        """The tokens of every conversation; `place(i)` says where one stands, for messages."""
        pieces = []
        for i, messages in enumerate(conversations):
            try:
                pieces.append(self.pieces(messages))
            except UserError as error:
                raise UserError(f"{place(i)}: {error}") from None
        texts = [piece.text for each in pieces for piece in each if not piece.special]
        encoded = iter(self._plain.encode_batch_fast(texts, add_special_tokens=False))
        found = []
        for each in pieces:
            ids = [
                [self._ids[piece.text]] if piece.special else next(encoded).ids for piece in each
            ]
            lengths = [len(part) for part in ids]
            learnt = np.repeat([piece.learnt for piece in each], lengths)
            found.append(Tokens(np.concatenate([np.array(part, np.int32) for part in ids]), learnt))
        return found

    def _words(self, words: str, ends: bool) -> list[Piece]:
        """The template's words. Where a message to be learnt `ends` before them, the special token
        that follows is learnt too, with the white space in front of it."""
        found, at = [], 0
        for match in self._special.finditer(words):
            text = words[at : match.start()]
            ends = ends and at == 0 and not text.strip()
            found += [Piece(text, False, ends), Piece(match[0], True, ends)]
            at = match.end()
        return [*found, Piece(words[at:], False, False)]

    def _shown(self, messages: Conversation) -> tuple[list[str], list[str]]:
        """The contents as the template writes them, as they are or without white space around
        them; and its words before, between and after them."""
        contents = [message["content"] for message in messages]
        first = _unused(contents)
        marks = [chr(first + i) for i in range(len(messages))]
        marked = self._render(messages, marks)
        if [char for char in marked if char in marks] != marks:
            raise UserError(
                "the chat template does not show every message once and in order: leave out the "
                "messages that it drops or moves"
            )
        whole = self._render(messages, contents)
        for shown in (contents, [content.strip() for content in contents]):
            table = {ord(mark): content for mark, content in zip(marks, shown, strict=True)}
            if marked.translate(table) == whole:
                return shown, re.split(f"[{marks[0]}-{marks[-1]}]", marked)
        raise UserError(
            "the chat template writes something else than the messages' contents: give it "
            "messages that it leaves as they are"
        )

    def _render(self, messages: Conversation, contents: Sequence[str]) -> str:
        filled = [{**m, "content": c} for m, c in zip(messages, contents, strict=True)]
        try:
            return self.tokenizer.apply_chat_template(filled, tokenize=False)
        except jinja2.TemplateError as error:
            raise UserError(f"the chat template refuses the conversation: {error}") from None


def _joined(pieces: Sequence[Piece]) -> list[Piece]:
    """The same with neighbours of text in one, and nothing empty."""
    found: list[Piece] = []
    for piece in pieces:
        last = found[-1] if found else None
        if last and not (last.special or piece.special) and last.learnt == piece.learnt:
            found[-1] = Piece(last.text + piece.text, False, piece.learnt)
        elif piece.text:
            found.append(piece)
    return found


def _unused(contents: Sequence[str]) -> int:
    """The first of as many private characters as there are contents, none of which any holds."""
    highest = max((ord(char) for content in contents for char in content), default=0)
    return max(_PRIVATE, highest + 1)
