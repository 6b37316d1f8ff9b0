"""Tokenizes examples into rows of any lengths, and pads them to batches."""

import bisect
import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from kd_jax.data import arrays
from kd_jax.types import Batch, Encoding

_OF_MARKED = ("tokens", "lengths", "spans", "counts")
_SLICE = 10_000  # examples tokenized at a time: bounds the memory
_LONGEST = 16  # examples with the most characters; the one with the most tokens is taken of them


@dataclasses.dataclass(frozen=True)
class Flat:
    """N rows of any lengths in flat arrays: row i is tokens_F[starts_N[i] : starts_N[i] +
    lengths_N[i]], and likewise in every other array."""

    tokens_F: np.ndarray  # int32, or uint16 where kept on disk: all rows one after another
    lengths_N: np.ndarray  # int32 or int64

    def __len__(self) -> int:
        return len(self.lengths_N)

    @functools.cached_property
    def starts_N(self) -> np.ndarray:
        return np.cumsum(self.lengths_N, dtype=np.int64) - self.lengths_N


@dataclasses.dataclass(frozen=True)
class Beginnings:
    """The beginnings of N texts, which a model is to continue: text i begins with
    tokens_F[starts_N[i] : starts_N[i] + lengths_N[i]]."""

    tokens_F: np.ndarray  # as in `Flat`
    starts_N: np.ndarray  # int64
    lengths_N: np.ndarray  # int64

    def __len__(self) -> int:
        return len(self.lengths_N)

    def padded(self, ids_B: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Pads beginnings with zeros: (tokens (B, length), their lengths), int32."""
        lengths_B = self.lengths_N[ids_B]
        valid_BT = np.arange(length)[None] < lengths_B[:, None]
        at_BT = np.where(valid_BT, self.starts_N[ids_B][:, None] + np.arange(length), 0)
        tokens_BT = np.where(valid_BT, self.tokens_F[at_BT], 0)
        return tokens_BT.astype(np.int32), lengths_B.astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Marked(Flat):
    """Rows in which each token is marked or not. The marks are kept as spans, so that what depends
    on them and on lengths alone needs no pass over tokens."""

    spans_S2: np.ndarray  # int32 (first, end) within a row: the marked stretches of all rows
    counts_N: np.ndarray  # int32, spans of each row

    def __getitem__(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns (tokens, marks) of one row: int32 and bool."""
        tokens_T = self.tokens_F[self.starts_N[row] :][: self.lengths_N[row]].astype(np.int32)
        marks_T = np.zeros(len(tokens_T), bool)
        for first, end in self.spans_S2[self._ends_N[row] - self.counts_N[row] : self._ends_N[row]]:
            marks_T[first:end] = True
        return tokens_T, marks_T

    @property
    def last_spans_N2(self) -> np.ndarray:
        """Returns the last marked stretch of each row, (first, end); of rows without any, that of
        another one."""
        return self.spans_S2[np.maximum(self._ends_N - 1, 0)]

    @functools.cached_property
    def _ends_N(self) -> np.ndarray:
        return np.cumsum(self.counts_N, dtype=np.int64)

    def within(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Counts the marks at positions [begin, end) of each row, finds the end of the last of
        them, 0 if there is none, and tells whether there are any behind: three arrays (N,)."""
        row_S = np.repeat(np.arange(len(self)), self.counts_N)
        first_S, end_S = self.spans_S2.T
        stop_S = np.minimum(end_S, end)
        size_S = np.maximum(stop_S - np.maximum(first_S, begin), 0)
        count_N = np.bincount(row_S, size_S, len(self)).astype(np.int64)
        last_N, behind_N = np.zeros(len(self), np.int64), np.zeros(len(self), bool)
        np.maximum.at(last_N, row_S[size_S > 0], stop_S[size_S > 0])
        behind_N[row_S[end_S > end]] = True
        return count_N, last_N, behind_N

    @classmethod
    def write(
        cls,
        folder: Path,
        slices: Iterable[Sequence[tuple[np.ndarray, np.ndarray]]],
        dtype: np.dtype,
    ) -> None:
        """Writes slices of rows, each (tokens, marks), as .npy files with tokens of `dtype`."""
        with contextlib.ExitStack() as stack:
            tokens, lengths, spans, counts = (
                stack.enter_context(arrays.Growing(folder / f"{name}.npy", *about))
                for name, about in zip(
                    _OF_MARKED, [(dtype,), (np.int32,), (np.int32, 2), (np.int32,)], strict=True
                )
            )
            for rows in slices:
                tokens.append(np.concatenate([tokens_T for tokens_T, _ in rows]))
                lengths.append(np.array([len(tokens_T) for tokens_T, _ in rows]))
                found = [_spans(marks_T) for _, marks_T in rows]
                spans.append(np.concatenate(found))
                counts.append(np.array([len(each) for each in found]))

    @classmethod
    def load(cls, folder: Path) -> "Marked":
        """Opens the files that `write` wrote."""
        return cls(*(np.asarray(arrays.load(folder / f"{name}.npy")) for name in _OF_MARKED))


def _spans(marks_T: np.ndarray) -> np.ndarray:
    """Finds the stretches of True: int (S, 2), (first, end) of each."""
    edges = np.flatnonzero(np.diff(np.asarray(marks_T, np.int8), prepend=0, append=0))
    return edges.reshape(-1, 2)


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
    ids, types, cut = [], [], []
    for start in range(0, max(1, len(first)), _SLICE):
        some = (each[start : start + _SLICE] for each in texts)
        found = tokenizer(
            *some, truncation="longest_first", max_length=seq_len, return_attention_mask=False
        )
        ids += [np.array(row, np.int32) for row in found["input_ids"]]
        types += [np.array(row, np.int32) for row in found.get("token_type_ids", ())]
        cut += [start + row for row, each in enumerate(found.encodings) if each.overflowing]
    typed = "token_type_ids" in found
    rows = join(ids, types if typed else None, labels_NP, pad_id(tokenizer))
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


@dataclasses.dataclass(frozen=True)
class Bins:
    """Items in bins: those of bin b are items_N[starts[b] : starts[b + 1]]."""

    items_N: np.ndarray
    starts: np.ndarray  # one more than bins

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, number: int) -> np.ndarray:
        return self.items_N[self.starts[number] : self.starts[number + 1]]


def pack(lengths_N: np.ndarray, room: int) -> Bins:
    """Packs items of lengths >= 1 into bins of size `room`.

    Best fit decreasing (Johnson 1974): the longest item first, into the fullest bin that it fits;
    never more than 11/9 of the bins of the best packing, plus four. Depends on the lengths alone.
    Raises ValueError for an item longer than `room`.
    """
    lengths_N = np.asarray(lengths_N, np.int64)
    order_N = np.argsort(-lengths_N, kind="stable")
    if len(order_N) and lengths_N[order_N[0]] > room:
        item = order_N[0]
        raise ValueError(f"item {item} of length {lengths_N[item]} does not fit into {room}")
    bin_N = np.empty(len(order_N), np.int64)  # of each item, in that order
    of_room: list[list[int]] = [[] for _ in range(room + 1)]  # bins by the room that is left
    rooms: list[int] = []  # those that some bin has, ascending
    count = at = 0
    sizes, numbers = np.unique(lengths_N, return_counts=True)
    # The fullest bin that an item fits stays so until no other of its length fits: all items of one
    # length are placed at a time, in the bins of one room.
    for length, many in zip(sizes[::-1].tolist(), numbers[::-1].tolist(), strict=True):
        while many:
            first = bisect.bisect_left(rooms, length)
            left = rooms[first] if first < len(rooms) else room
            each = left // length
            wanted = -(-many // each)
            if first < len(rooms):
                taken = of_room[left][: -wanted - 1 : -1]
                del of_room[left][-len(taken) :]
                if not of_room[left]:
                    del rooms[first]
            else:
                taken = list(range(count, count + wanted))
                count += wanted
            placed = min(many, each * len(taken))
            bin_N[at : at + placed] = np.repeat(taken, each)[:placed]
            at, many = at + placed, many - placed
            last = placed - each * (len(taken) - 1)  # items in the last of them
            for bins, items in ((taken[:-1], each), (taken[-1:], last)):
                if bins and not of_room[left - items * length]:
                    bisect.insort(rooms, left - items * length)
                of_room[left - items * length] += bins
    starts = np.concatenate([[0], np.cumsum(np.bincount(bin_N, minlength=count))])
    return Bins(order_N[np.argsort(bin_N, kind="stable")], starts)


def continued(prompt_T: np.ndarray, written_N: np.ndarray, learned: bool = True) -> tuple:
    """Makes a piece of a row for `batch`: a prompt, and after it text of which every token is
    learned, or none."""
    whole_T = np.concatenate([prompt_T, written_N])
    weights_T = learned & (np.arange(1, len(whole_T)) >= len(prompt_T))
    return whole_T[:-1], whole_T[1:], weights_T, 0


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
