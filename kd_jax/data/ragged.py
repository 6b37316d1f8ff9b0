"""Rows of tokens of any lengths: in one folder, packed together, and as batches."""

import bisect
import dataclasses
import functools
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from kd_jax.types import Batch


@dataclasses.dataclass(frozen=True)
class Ragged:
    """N rows: row i is tokens_F[starts_N[i] : starts_N[i] + lengths_N[i]], marks likewise."""

    tokens_F: np.ndarray  # int32, all rows one after another
    marks_F: np.ndarray  # bool
    lengths_N: np.ndarray  # int64

    @classmethod
    def of(cls, tokens: Sequence[np.ndarray], marks: Sequence[np.ndarray]) -> "Ragged":
        """Of at least one row."""
        lengths_N = np.array([len(row) for row in tokens], np.int64)
        return cls(np.concatenate(tokens).astype(np.int32), np.concatenate(marks), lengths_N)

    @functools.cached_property
    def starts_N(self) -> np.ndarray:
        return np.cumsum(self.lengths_N) - self.lengths_N

    def __len__(self) -> int:
        return len(self.lengths_N)

    def __getitem__(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, marks) of one row."""
        here = slice(self.starts_N[row], self.starts_N[row] + self.lengths_N[row])
        return self.tokens_F[here], self.marks_F[here]

    def save(self, folder: Path) -> None:
        """Writes every array as a .npy file."""
        np.save(folder / "tokens.npy", self.tokens_F)
        np.save(folder / "marks.npy", np.packbits(self.marks_F))
        np.save(folder / "lengths.npy", self.lengths_N)

    @classmethod
    def load(cls, folder: Path) -> "Ragged":
        """Reads what `save` wrote."""
        tokens_F = np.load(folder / "tokens.npy")
        marks_F = np.unpackbits(np.load(folder / "marks.npy"), count=len(tokens_F)).astype(bool)
        return cls(tokens_F, marks_F, np.load(folder / "lengths.npy"))


def pack(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Numbers of the items of each bin of `room`, every item in one of them.

    Best fit decreasing (Johnson 1974): the longest item first, into the fullest bin that takes it;
    never more than 11/9 of the bins of the best packing, and four more. A function of the lengths
    alone. Raises ValueError for an item longer than `room`.
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
    """A batch of rows padded to `length`, labels and weights (B, T), with segments if `several`.

    A row's pieces, (tokens (N,), labels, weights, number of its segment), stand one behind another.
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
