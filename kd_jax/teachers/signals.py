"""Signals on disk: what a teacher, or the mean of an ensemble's members, says of every learnt token
of a fixed set of rows. Computed in one pass, read at every step of every round.

    ROOT/NAME/values.npy    float32 (M, K): log-probabilities of M tokens, one row's after another's
    ROOT/NAME/ids.npy       int32 (M, K): whose they are; not there where K is the vocabulary
    ROOT/NAME/rest.npy      float32 (M,): of each of the other ids

NAME says what it was computed from. A folder is written beside its place and renamed when it is
complete, so that what a crash leaves is never read.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

import numpy as np

from kd_jax.data import cache
from kd_jax.errors import UserError
from kd_jax.types import Batch, Signal

log = logging.getLogger(__name__)


def name_of(*parts: object) -> str:
    """32 hex digits of what a signal is computed from."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(f"{part}\0".encode())
    return digest.hexdigest()


def size_of(tokens: int, k: int, vocab_size: int) -> int:
    """Bytes on disk."""
    return tokens * 4 * (k if k == vocab_size else 2 * k + 1)


def make_room(root: Path, bytes_: int, max_bytes: float, needed: Collection[str]) -> None:
    """Removes signals, the longest unused first but none of `needed`, until `bytes_` more are
    within `max_bytes`. Raises UserError where that cannot be."""
    root = Path(root)
    found = {f: _size(f) for f in root.glob("*") if f.is_dir() and f.name not in needed}
    others = sorted(found, key=lambda folder: folder.stat().st_mtime)
    own = sum(_size(root / name) for name in needed if (root / name).is_dir())
    if own + bytes_ > max_bytes:
        raise UserError(
            f"logits on disk: {(own + bytes_) / 1e9:.3g} GB are wanted in {root}, "
            f"config.cache.max_gb={max_bytes / 1e9:g}; raise it, or lower config.ensemble.rows or "
            f"config.ensemble.top_k"
        )
    while others and own + bytes_ + sum(map(found.get, others)) > max_bytes:
        shutil.rmtree(others.pop(0), ignore_errors=True)


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*"))


def kept(tokens: int, vocab_size: int, top_k: int, max_bytes: float) -> int:
    """How many logits of a token three signals (a teacher's, a mean's, and the next mean's) can
    have: all where that fits, else `top_k`."""
    fits = 3 * size_of(tokens, vocab_size, vocab_size) <= max_bytes
    return vocab_size if fits or top_k >= vocab_size else top_k


class Signals:
    """One signal of R rows, mapped into memory."""

    def __init__(self, folder: Path, counts_R: np.ndarray):
        """`counts_R`: learnt tokens of each row."""
        self.folder = Path(folder)
        self._ends_R = np.cumsum(counts_R)
        self._counts_R = counts_R
        arrays = {path.stem: np.load(path, mmap_mode="r") for path in self.folder.glob("*.npy")}
        self._values_MK, self._ids_MK = arrays["values"], arrays.get("ids")
        self._rest_M = arrays.get("rest")
        if len(self._values_MK) != self._ends_R[-1]:
            raise ValueError(f"{folder} has {len(self._values_MK)} tokens, not {self._ends_R[-1]}")

    @property
    def k(self) -> int:
        """Logits of a token."""
        return self._values_MK.shape[1]

    def of(self, batch: Batch) -> Signal:
        """The signal of a batch with NumPy arrays; tokens that are not learnt have zeros."""
        shape = *batch.tokens_BT.shape, self.k
        found = Signal(np.zeros(shape, np.float32))
        if self._ids_MK is not None:
            # Zeros of their own id, so that no id is set twice.
            ids_BTK = np.broadcast_to(np.arange(self.k, dtype=np.int32), shape).copy()
            found = found.replace(ids_BTK=ids_BTK, rest_BT=np.zeros(shape[:2], np.float32))
        for b, row in enumerate(batch.ids_B):
            if row < 0:
                continue
            learnt_T = batch.weights[b] > 0
            tokens = slice(self._ends_R[row] - self._counts_R[row], self._ends_R[row])
            found.values_BTK[b, learnt_T] = self._values_MK[tokens]
            if self._ids_MK is not None:
                found.ids_BTK[b, learnt_T] = self._ids_MK[tokens]
                found.rest_BT[b, learnt_T] = self._rest_M[tokens]
        return found


def written(
    root: Path,
    name: str,
    counts_R: np.ndarray,
    compute: Callable[[], Iterable[tuple[Batch, Signal]]],
) -> Signals:
    """The signal `name`, computed where it is not there yet. Programs of one machine that want the
    same one wait for the first.

    `compute` gives every batch of the rows, with NumPy arrays, and its signal.
    """
    folder = Path(root) / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with cache.lock(folder.with_suffix(".lock")):
        if folder.exists():
            os.utime(folder)  # it is of use: others go first when room is needed
        else:
            for left in Path(root).glob(f"{name}.*.partial"):  # of programs that are gone
                shutil.rmtree(left, ignore_errors=True)
            partial = folder.with_name(f"{name}.{os.getpid()}.partial")
            partial.mkdir()
            _write(partial, counts_R, compute())
            partial.rename(folder)
    return Signals(folder, counts_R)


def _write(folder: Path, counts_R: np.ndarray, found: Iterable[tuple[Batch, Signal]]) -> None:
    ends_R, files = np.cumsum(counts_R), {}
    for batch, signal in found:
        parts = {"values": signal.values_BTK, "ids": signal.ids_BTK, "rest": signal.rest_BT}
        parts = {name: np.asarray(part) for name, part in parts.items() if part is not None}
        for name, part in parts.items():
            if name not in files:
                shape = int(ends_R[-1]), *part.shape[2:]
                files[name] = np.lib.format.open_memmap(
                    folder / f"{name}.npy", mode="w+", dtype=part.dtype, shape=shape
                )
        for b, row in enumerate(batch.ids_B):
            if row >= 0:
                learnt_T = batch.weights[b] > 0
                tokens = slice(ends_R[row] - counts_R[row], ends_R[row])
                for name, part in parts.items():
                    files[name][tokens] = part[b, learnt_T]
    for file in files.values():
        file.flush()
