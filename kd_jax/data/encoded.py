"""Tokenizes examples into rows of any lengths, and pads them to batches."""

import bisect
import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from kd_jax.types import Batch, Encoding

_LONGEST = 16  # examples with the most characters; the one with the most tokens is taken of them


@dataclasses.dataclass(frozen=True)
class Flat:
    """N rows of any lengths in flat arrays: row i is tokens_F[starts_N[i] : starts_N[i] +
    lengths_N[i]], and likewise in every other array."""

    tokens_F: np.ndarray  # int32, all rows one after another
    lengths_N: np.ndarray  # int64

    def __len__(self) -> int:
        return len(self.lengths_N)

    @functools.cached_property
    def starts_N(self) -> np.ndarray:
        return np.cumsum(self.lengths_N) - self.lengths_N


@dataclasses.dataclass(frozen=True)
class Marked(Flat):
    """Rows in which each token is marked or not."""

    marks_F: np.ndarray  # bool

    @classmethod
    def of(cls, tokens: Sequence[np.ndarray], marks: Sequence[np.ndarray]) -> "Marked":
        """Joins lists of tokens and of their marks into flat arrays; there is at least one row."""
        lengths_N = np.array([len(row) for row in tokens], np.int64)
        return cls(_flat(tokens), lengths_N, np.concatenate(marks))

    def __getitem__(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns (tokens, marks) of one row."""
        here = slice(self.starts_N[row], self.starts_N[row] + self.lengths_N[row])
        return self.tokens_F[here], self.marks_F[here]

    def save(self, folder: Path) -> None:
        """Writes every array as a .npy file."""
        np.save(folder / "tokens.npy", self.tokens_F)
        np.save(folder / "marks.npy", np.packbits(self.marks_F))
        np.save(folder / "lengths.npy", self.lengths_N)

    @classmethod
    def load(cls, folder: Path) -> "Marked":
        """Reads the arrays that `save` wrote."""
        tokens_F = np.load(folder / "tokens.npy")
        marks_F = np.unpackbits(np.load(folder / "marks.npy"), count=len(tokens_F)).astype(bool)
        return cls(tokens_F, np.load(folder / "lengths.npy"), marks_F)


@dataclasses.dataclass(frozen=True)
class Encoded(Flat):
    """Tokenized examples: rows with labels, and token types where the tokenizer gives any."""

    types_F: np.ndarray | None  # int32 token types
    labels_NP: np.ndarray  # int32 classes or positions; float32 for a regression
    pad_id: int
    cut: int = 0  # examples that are longer than a row, and lost tokens
    longest: int = 0  # tokens of the longest example before it was cut

    @functools.cached_property
    def digests(self) -> list[bytes]:
        """Hashes the model's input of each row, without its labels: 16 bytes each."""
        found = []
        for start, length in zip(self.starts_N, self.lengths_N, strict=True):
            digest = hashlib.blake2b(self.tokens_F[start : start + length], digest_size=16)
            if self.types_F is not None:
                digest.update(b"types")
                digest.update(self.types_F[start : start + length])
            found.append(digest.digest())
        return found

    def batch(self, ids_B: np.ndarray, length: int) -> Batch:
        """Pads rows to `length`, as NumPy arrays. ValueError where a row is longer."""
        tokens_BT, mask_BT, types_BT = self._padded(ids_B, length)
        labels_BP = self.labels_NP[ids_B]
        return Batch(
            ids_B=np.asarray(ids_B, np.int32),
            tokens_BT=tokens_BT,
            mask_BT=mask_BT,
            labels=labels_BP,
            weights=np.ones(labels_BP.shape, np.float32),
            types_BT=types_BT,
        )

    def encoding(self, ids_B: np.ndarray, length: int) -> Encoding:
        """Pads rows to `length` without labels, for a teacher that has a different tokenizer."""
        tokens_BT, mask_BT, types_BT = self._padded(ids_B, length)
        return Encoding(tokens_BT=tokens_BT, mask_BT=mask_BT, types_BT=types_BT)

    def _padded(self, ids_B, length):
        lengths_B1 = self.lengths_N[ids_B][:, None]
        if lengths_B1.max() > length:
            raise ValueError(f"a row of {lengths_B1.max()} tokens does not fit into {length}")
        valid_BT = np.arange(length) < lengths_B1
        index_BT = np.where(valid_BT, self.starts_N[ids_B][:, None] + np.arange(length), 0)
        tokens_BT = np.where(valid_BT, self.tokens_F[index_BT], np.int32(self.pad_id))
        types_BT = None
        if self.types_F is not None:
            types_BT = np.where(valid_BT, self.types_F[index_BT], np.int32(0))
        return tokens_BT, valid_BT.astype(np.float32), types_BT


def encode(
    tokenizer: PreTrainedTokenizerBase,
    first: Sequence[str],
    second: Sequence[str] | None,
    labels_NP: np.ndarray,
    seq_len: int,
) -> Encoded:
    """Tokenizes texts, or pairs of texts, with the tokenizer's special tokens. Rows longer than
    `seq_len` lose tokens at the end, pairs at the end of their longer text."""
    texts = [list(first)] if second is None else [list(first), list(second)]
    found = tokenizer(
        *texts, truncation="longest_first", max_length=seq_len, return_attention_mask=False
    )
    rows = join(found["input_ids"], found.get("token_type_ids"), labels_NP, pad_id(tokenizer))
    cut = [row for row, each in enumerate(found.encodings) if each.overflowing]
    longest = int(rows.lengths_N.max(initial=0))
    if cut:  # their tokens were not counted; the longest has the most characters, or nearly so
        cut.sort(key=lambda row: -sum(len(each[row]) for each in texts))
        whole = tokenizer(*([each[row] for row in cut[:_LONGEST]] for each in texts), verbose=False)
        longest = max(map(len, whole["input_ids"]))
    return dataclasses.replace(rows, cut=len(cut), longest=longest)


def join(
    tokens: Sequence[Sequence[int]],
    types: Sequence[Sequence[int]] | None,
    labels_NP: np.ndarray,
    pad: int,
    kind: type[Encoded] = Encoded,
    **more: Any,
) -> Any:
    """Joins lists of token ids (and token types, if any) into an instance of the class `kind`, with
    `more` as its other fields."""
    return kind(
        tokens_F=_flat(tokens),
        types_F=None if types is None else _flat(types),
        lengths_N=np.array([len(row) for row in tokens], np.int64),
        labels_NP=labels_NP,
        pad_id=pad,
        **more,
    )


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns the padding token's id; 0 where there is none, since the mask hides padding
    anyway."""
    return 0 if tokenizer.pad_token is None else tokenizer.pad_token_id


def _flat(rows) -> np.ndarray:
    return np.concatenate([np.asarray(row, np.int32) for row in rows] or [np.zeros(0, np.int32)])


def pack(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Packs items into bins of size `room`: returns the indices of the items in each bin.

    Best fit decreasing (Johnson 1974): the longest item first, into the fullest bin that it fits;
    never more than 11/9 of the bins of the best packing, plus four. Depends on the lengths alone.
    Raises ValueError for an item longer than `room`.
    """
    bins: list[list[int]] = []
    of_room: list[list[int]] = [[] for _ in range(room + 1)]  # bins by the room that is left
    rooms: list[int] = []  # those that some bin has, ascending
    for item in sorted(range(len(lengths)), key=lambda item: -lengths[item]):
        length = lengths[item]
        if length > room:
            raise ValueError(f"item {item} of length {length} does not fit into {room}")
        at = bisect.bisect_left(rooms, length)
        if at == len(rooms):
            number, left = len(bins), room
            bins.append([])
        else:
            left = rooms[at]
            number = of_room[left].pop()
            if not of_room[left]:
                del rooms[at]
        bins[number].append(item)
        left -= length
        if not of_room[left]:
            bisect.insort(rooms, left)
        of_room[left].append(number)
    return bins


def batch(ids_B: np.ndarray, rows: Iterable[Iterable[tuple]], length: int, several: bool) -> Batch:
    """Makes a batch of rows padded to `length`, with labels and weights (B, T), and with segments
    if `several`.

    A row is the concatenation of its pieces: (tokens (N,), labels, weights, number of its segment).
    """
    shape = len(ids_B), length
    tokens_BT, labels_BT, segments_BT = (np.zeros(shape, np.int32) for _ in range(3))
    mask_BT, weights_BT = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    for row, pieces in enumerate(rows):
        start = 0
        for tokens_N, labels_N, weights_N, segment in pieces:
            stop = start + len(tokens_N)
            here, start = (row, slice(start, stop)), stop
            tokens_BT[here], labels_BT[here], weights_BT[here] = tokens_N, labels_N, weights_N
            segments_BT[here] = segment
        mask_BT[row, :start] = 1.0
    return Batch(
        ids_B=np.asarray(ids_B, np.int32),
        tokens_BT=tokens_BT,
        mask_BT=mask_BT,
        labels=labels_BT,
        weights=weights_BT,
        segments_BT=segments_BT if several else None,
    )
