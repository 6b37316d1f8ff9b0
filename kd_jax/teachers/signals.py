"""Signals on disk: what a teacher, or the mean of an ensemble's members, says of every learnt token
of a fixed set of rows. Computed in one pass, read at every step of every round.

    ROOT/NAME/values.npy    float32 (M, K): log-probabilities of M tokens, one row's after another's
    ROOT/NAME/ids.npy       int32 (M, K): whose they are; not there where K is the vocabulary
    ROOT/NAME/rest.npy      float32 (M,): of each of the other ids

NAME says what it was computed from. The folder is an entry of the cache (data/cache.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path

import numpy as np

from kd_jax.data import cache
from kd_jax.errors import UserError
from kd_jax.types import Batch, Signal

SETTING = "config.cache.folder"
NOT_FINITE = "its weights hold NaN or infinity, or are too large for config.precision"


def size_of(tokens: int, k: int, vocab_size: int) -> int:
    """Counts the bytes of a signal on disk."""
    return tokens * 4 * (k if k == vocab_size else 2 * k + 1)


def make_room(root: Path, bytes_: int, max_bytes: float, needed: Collection[str]) -> None:
    """Removes signals, the longest unused first but none of `needed`, until `bytes_` more are
    within `max_bytes`. Raises UserError where that cannot be."""
    root = Path(root)
    wanted = cache.make_room(root, bytes_, max_bytes, [root / name for name in needed], SETTING)
    if wanted > max_bytes:
        raise UserError(
            f"logits on disk: {wanted / 1e9:.3g} GB are wanted in {root}, "
            f"config.cache.max_gb={max_bytes / 1e9:g}; raise it, or lower config.ensemble.rows or "
            f"config.ensemble.top_k"
        )


def kept(tokens: int, vocab_size: int, top_k: int, max_bytes: float) -> int:
    """Counts the logits of a token that three signals (a teacher's, a mean's, the next mean's) can
    have: all where that fits, else `top_k`."""
    fits = 3 * size_of(tokens, vocab_size, vocab_size) <= max_bytes
    return vocab_size if fits or top_k >= vocab_size else top_k


class Signals:
    """One signal of R rows, mapped into memory; see `opened` and `written`."""

    def __init__(self, folder: Path, counts_R: np.ndarray, vocab_size: int):
        """`counts_R`: learnt tokens of each row."""
        self.folder, self._bounds = Path(folder), _bounds(counts_R)
        self._parts = {"values": self._map("values")}
        have, wanted = len(self._parts["values"]), self._bounds[-1]
        if have != wanted:
            raise ValueError(f"{folder} has {have} tokens, not {wanted}")
        if self.k < vocab_size:
            self._parts |= {name: self._map(name) for name in ("ids", "rest")}
            cache.check_ids(self._parts["ids"], vocab_size, self.folder)

    def _map(self, name: str) -> np.ndarray:
        return np.load(self.folder / f"{name}.npy", mmap_mode="r")

    @property
    def k(self) -> int:
        """Logits of a token."""
        return self._parts["values"].shape[1]

    def of(self, batch: Batch) -> Signal:
        """Reads the signal of a batch with NumPy arrays; tokens that are not learnt have zeros."""
        found = {
            name: np.zeros((*batch.tokens_BT.shape, *part.shape[1:]), part.dtype)
            for name, part in self._parts.items()
        }
        if "ids" in found:
            found["ids"][:] = np.arange(self.k)  # zeros of their own id, so that none is set twice
        for _, learnt, tokens in _places(batch, self._bounds):
            for name, part in self._parts.items():
                found[name][learnt] = part[tokens]
        return Signal(found["values"], found.get("ids"), found.get("rest"))


def _bounds(counts_R: np.ndarray) -> np.ndarray:
    """Where in the files each row begins, and the last one ends."""
    return np.concatenate([[0], np.cumsum(counts_R)])


def _places(batch: Batch, bounds: np.ndarray) -> Iterator[tuple[int, tuple, slice]]:
    """Each row of a batch: its id, where its learnt tokens are there, and where in the files."""
    for b, row in enumerate(batch.ids_B):
        if row >= 0:  # the others fill the batch up
            yield row, (b, batch.weights[b] > 0), slice(bounds[row], bounds[row + 1])


def opened(folder: Path, counts_R: np.ndarray, vocab_size: int) -> Signals | None:
    """Opens the signal of a folder; None where it is not there, or damaged."""
    with contextlib.suppress(FileNotFoundError):  # another run has just made room for its own
        if cache.whole(folder):
            cache.touch(folder)
            return Signals(folder, counts_R, vocab_size)
    return None


def written(
    folder: Path,
    counts_R: np.ndarray,
    vocab_size: int,
    compute: Callable[[], Iterable[tuple[Batch, Signal]]],
    who: str,
) -> Signals:
    """Opens the signal of a folder; computes it where it is not there yet. Programs of one machine
    that want the same one wait for the first.

    `compute` gives every batch of the rows, with NumPy arrays, and its signal. Raises UserError,
    that names `who`, where one is not finite; or where the folder cannot be written.
    """
    while (found := opened(folder, counts_R, vocab_size)) is None:
        cache.once(folder, lambda made: _write(made, counts_R, compute(), who), SETTING)
    return found


def _write(
    folder: Path, counts_R: np.ndarray, found: Iterable[tuple[Batch, Signal]], who: str
) -> None:
    bounds, files = _bounds(counts_R), {}
    for batch, signal in found:
        parts = {"values": signal.values_BTK, "ids": signal.ids_BTK, "rest": signal.rest_BT}
        parts = {name: np.asarray(part) for name, part in parts.items() if part is not None}
        for name, part in parts.items():
            if name not in files:
                shape = int(bounds[-1]), *part.shape[2:]
                files[name] = np.lib.format.open_memmap(
                    folder / f"{name}.npy", mode="w+", dtype=part.dtype, shape=shape
                )
        for row, learnt, tokens in _places(batch, bounds):
            for name, part in parts.items():
                if not np.isfinite(part[learnt]).all():
                    raise UserError(f"{who}: its logits of row {row} are not finite; {NOT_FINITE}")
                files[name][tokens] = part[learnt]
    for file in files.values():
        file.flush()
