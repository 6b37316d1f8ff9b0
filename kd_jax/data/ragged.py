"""Rows of tokens of any lengths, each token with a mark, in one folder."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np


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
