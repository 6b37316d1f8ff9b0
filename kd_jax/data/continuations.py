"""Puts stretches of tokens, each of which a language model scores after a context, into rows.

Stretches that have the same context, such as the endings of one question, share a row, so that the
context is computed once: the context comes first (segment 0), then each stretch as a separate
segment, which begins with the context's last token, since that token predicts the stretch's first
one (`Batch.segments_BT`).
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from kd_jax.data import encoded
from kd_jax.data.loader import BucketStream, lengths_of
from kd_jax.data.splits import Questions
from kd_jax.errors import UserError
from kd_jax.types import Batch

_WORTH = 4  # batches that make a length worth compiling


@dataclasses.dataclass(frozen=True)
class Stretches:
    """N stretches of tokens to score: `scored_N2` holds the [begin, end) of each in the flat array
    of tokens, `context_N2` that of its context, which has at least one token."""

    tokens_F: np.ndarray  # int32
    context_N2: np.ndarray  # int64
    scored_N2: np.ndarray  # int64

    def __len__(self) -> int:
        return len(self.scored_N2)

    @functools.cached_property
    def counts_N(self) -> np.ndarray:
        """Counts the scored tokens of each stretch."""
        return self.scored_N2[:, 1] - self.scored_N2[:, 0]


class Rows:
    """Puts stretches into R rows for a model with `max_tokens` positions: stretches are never cut,
    contexts lose tokens at their beginning where they do not fit.

    The last token of a stretch is predicted and not read, so context and stretch may together have
    max_tokens + 1 tokens, as in the lm-evaluation-harness.

    truncated_N: whether a stretch's context was cut; left_out_N: whether the stretch alone is
    longer than `max_tokens`, so that no row holds it.
    """

    def __init__(self, stretches: Stretches, max_tokens: int, owners_N: np.ndarray | None = None):
        """Groups neighboring stretches of one owner into shared rows; without owners, every stretch
        has a row to itself."""
        self._stretches = stretches
        context_N2, counts_N = stretches.context_N2, stretches.counts_N
        begin_N = np.maximum(context_N2[:, 0], context_N2[:, 1] + counts_N - (max_tokens + 1))
        self.left_out_N = counts_N > max_tokens
        self.truncated_N = (begin_N > context_N2[:, 0]) & ~self.left_out_N
        self._shared_N2 = np.stack([begin_N, context_N2[:, 1] - 1], axis=1)  # last token left out
        self._rows = self._grouped(owners_N, max_tokens)
        self.branches = max((len(row) for row in self._rows), default=1)
        shared_N = self._shared_N2[:, 1] - begin_N
        self.lengths_R = np.array(
            [shared_N[row[0]] + counts_N[row].sum() for row in self._rows], np.int64
        )

    def __len__(self) -> int:
        return len(self._rows)

    def _grouped(self, owners_N, max_tokens) -> list[np.ndarray]:
        """Groups stretches into rows of at most `max_tokens` tokens, or twice the first stretch and
        its context if that is more. Longer rows would waste work: attention is computed between all
        tokens of a row, although segments do not see each other."""
        rows, alike = [], {}
        for n in np.flatnonzero(~self.left_out_N).tolist():
            owner = n if owners_N is None else owners_N[n]
            (begin, end), count = self._shared_N2[n].tolist(), int(self._stretches.counts_N[n])
            row, free = alike.get((owner, begin, end), ([], -1))
            if count > free:
                length = end - begin + count
                row, free = [], max(max_tokens, 2 * length) - (end - begin)
                rows.append(row)
            row.append(n)
            alike[owner, begin, end] = row, free - count
        return [np.array(row) for row in rows]

    def batches(
        self,
        batch_size: int,
        devices: int = 1,
        process_index: int = 0,
        process_count: int = 1,
    ) -> Iterator[Batch]:
        """Makes batches of all rows, in one pass, the longest first, padded to a few lengths.

        Each length is compiled, so little data gets fewer lengths. A batch of the shortest rows
        has about `batch_size` stretches; batches of longer rows have as many tokens, so that all
        take about the same memory. The number of rows is a multiple of `devices`.
        """
        longest = -(-int(self.lengths_R.max()) // 8) * 8
        most = max(1, len(self._stretches) // (_WORTH * batch_size))
        lengths = lengths_of(self.lengths_R, longest, most)
        order_R = np.argsort(self.lengths_R, kind="stable")
        shorter = np.searchsorted(self.lengths_R[order_R], (0, *lengths[:-1]), side="right")
        stop = len(order_R)
        for length, first in zip(reversed(lengths), reversed(shorter.tolist()), strict=True):
            if first >= stop:
                continue
            count = batch_size * lengths[0] // (self.branches * length)
            count = max(1, count // devices) * devices
            # The last batch is filled up with rows of the next shorter length.
            first = max(0, stop - -(-(stop - first) // count) * count)
            rows_R, stop = order_R[first:stop], first
            stream = BucketStream(
                self.lengths_R[rows_R],
                (length,),
                lambda ids_B, length, rows_R=rows_R: self.batch(rows_R[ids_B], length),
                count,
                process_index=process_index,
                process_count=process_count,
            )
            yield from stream.batches()

    def batch(self, ids_B: np.ndarray, length: int) -> Batch:
        """Pads rows to `length`: labels and weights (B, T) stand at the tokens that predict scored
        ones; there are segments if any row has more than one stretch."""
        rows = (self._pieces(self._rows[r]) for r in ids_B)
        return encoded.batch(ids_B, rows, length, self.branches > 1)

    def _pieces(self, row: np.ndarray) -> Iterator[tuple]:
        """Lists the pieces of a row: the context without its last token, then every stretch."""
        tokens_F = self._stretches.tokens_F
        begin, last = self._shared_N2[row[0]]
        yield tokens_F[begin:last], 0, 0.0, 0
        for number, n in enumerate(row, 1):
            first, end = self._stretches.scored_N2[n]
            tokens_N = np.concatenate([tokens_F[last : last + 1], tokens_F[first : end - 1]])
            yield tokens_N, tokens_F[first:end], 1.0, number

    def by_stretch(self, found: dict[int, np.ndarray]) -> np.ndarray:
        """Orders values by stretch: from (K,) values for the segments of each row to float64 (N,),
        NaN for stretches that were left out."""
        values_N = np.full(len(self._stretches), np.nan)
        for r, row in enumerate(self._rows):
            values_N[row] = found[r][: len(row)]
        return values_N


class Question(NamedTuple):
    """A multiple-choice question: a context and several endings, one of which is right."""

    context: str
    endings: tuple[str, ...]  # each follows the context after a space
    answer: int | None  # index of the right ending; None where a test set keeps it secret
    group: str = ""  # questions of one kind, whose figures are given apart


def questions(
    name: str, found: Iterable[tuple[str, Question]], commit: str | None = None
) -> Questions:
    """Collects questions from (place, question) pairs. Raises UserError if there are none, for a
    question with fewer than two endings, and for a right answer that is not among the endings."""
    places, kept = [], []
    for place, question in found:
        count = len(question.endings)
        if count < 2:
            raise UserError(f"{place}: {count} endings, there must be two or more to choose from")
        if question.answer is not None and not 0 <= question.answer < count:
            raise UserError(
                f"{place}: the label is {question.answer}; with {count} endings it must be one of "
                f"0 to {count - 1}"
            )
        places.append(place)
        kept.append(question)
    if not kept:
        raise UserError(f"{name} holds no questions")
    return Questions(name, kept, places.__getitem__, commit)


def together(parts: list[Questions]) -> Questions:
    """Joins the questions of several sources, in their order."""
    if len(parts) == 1:
        return parts[0]
    places = [part.place(row) for part in parts for row in range(len(part))]
    everything = [question for part in parts for question in part.questions]
    name = ", ".join(part.name for part in parts)
    return Questions(name, everything, places.__getitem__, parts[0].commit)


def endings(tokenizer: PreTrainedTokenizerBase, questions: Questions) -> tuple[Stretches, list]:
    """Tokenizes every ending of every question after its context; also returns the index of the
    question that each ending belongs to.

    Tokenizes as the lm-evaluation-harness does: context, space and ending as one text, by
    `begun`; if the context alone has n tokens, the ending's tokens are those from the n-th on.
    White space at the end of the context belongs to the ending. An empty context is replaced by
    the beginning-of-text token (or else the end-of-text token).

    Raises UserError for an ending without tokens.
    """
    contexts, wholes, owners = [], [], []
    for index, question in enumerate(questions.questions):
        kept = question.context.rstrip()
        contexts.append(kept)
        rest = question.context[len(kept) :] + " "
        wholes += [kept + rest + ending for ending in question.endings]
        owners += [index] * len(question.endings)
    context_ids, whole_ids = begun(tokenizer, contexts), begun(tokenizer, wholes)
    pieces, context_N2, scored_N2, end = [], [], [], 0
    for n, (owner, whole) in enumerate(zip(owners, whole_ids, strict=True)):
        context = context_ids[owner]
        ending = whole[len(context) :]
        if not ending:
            raise UserError(
                f"{questions.place(owner)}: the ending {wholes[n][len(contexts[owner]) :]!r} has "
                f"no token of its own"
            )
        if n == 0 or owners[n - 1] != owner:
            context = context or [beginning(tokenizer)]
            pieces.append(context)
            begin, end = end, end + len(context)
            context_N2.append((begin, end))
        else:
            context_N2.append(context_N2[-1])
        pieces.append(ending)
        scored_N2.append((end, end + len(ending)))
        end += len(ending)
    flat = np.concatenate([np.asarray(piece, np.int32) for piece in pieces])
    return Stretches(flat, np.array(context_N2, np.int64), np.array(scored_N2, np.int64)), owners


def sliding(texts: Sequence[Sequence[int]], window: int, stride: int) -> Stretches:
    """Makes the stretches that sliding windows score: a window reads `window` tokens, moves on by
    `stride`, and scores the tokens that no window before it did.

    A window that begins at token b reads [b, b + window) and predicts [b + 1, b + window + 1), so
    every token of a text but its first is scored exactly once.
    """
    context_N2, scored_N2, start = [], [], 0
    for text in texts:
        scored = 1
        for begin in range(0, len(text), stride):
            end = min(begin + window + 1, len(text))
            if end > scored:
                context_N2.append((start + begin, start + scored))
                scored_N2.append((start + scored, start + end))
                scored = end
        start += len(text)
    flat = np.concatenate([np.asarray(text, np.int32) for text in texts])
    return Stretches(
        flat, np.array(context_N2, np.int64).reshape(-1, 2), np.array(scored_N2).reshape(-1, 2)
    )


def beginning(tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns the token from which the first token of a text is predicted: bos, or else eos."""
    for name in ("bos_token", "eos_token"):
        if getattr(tokenizer, name) is not None:
            return getattr(tokenizer, f"{name}_id")
    raise UserError(
        f"tokenizer {tokenizer.name_or_path!r} has neither a bos_token nor an eos_token, after "
        f"which a text could begin"
    )


def begun(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Tokenizes texts with the special tokens that the tokenizer puts in front of a text, but
    without those that it puts behind it, since an ending follows a context."""
    probe = tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"]
    behind = probe[::-1].index(0)
    rows = tokenizer(list(texts), return_attention_mask=False, verbose=False)["input_ids"]
    return [row[: len(row) - behind] for row in rows]
