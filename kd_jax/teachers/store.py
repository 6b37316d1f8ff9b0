"""Teacher logits on disk, found again by content: computed once, reused over epochs, stages, runs.

A teacher's folder is named after its weights and types (`identity`), a row's logits after what the
teacher reads of it (16 bytes, `Encoded.digests`): tokens, not text, so another tokenizer finds
nothing, and the same row in another order, split or run is found. A folder grows by parts that are
written beside their place and renamed, so that what a crash leaves is never read:

    ROOT/IDENTITY/PART.npz    digests (N, 16) and sizes (N, 2): answers x classes of each row
    ROOT/IDENTITY/PART.npy    float32, all rows' logits one after another
"""

import contextlib
import hashlib
import logging
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kd_jax.types import Params

log = logging.getLogger(__name__)


def identity(params: Params, about: Any) -> str:
    """32 hex digits of a teacher: its weights by path, and `about`, whatever else its logits
    depend on (architecture, types)."""
    digest = hashlib.blake2b(repr(about).encode(), digest_size=16)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


class Store:
    """The logits of one teacher."""

    def __init__(self, root: Path, name: str, max_gb: float):
        """`name` is the teacher's `identity`; `max_gb` bounds all teachers under `root`."""
        self._root, self._folder, self._max_bytes = Path(root), Path(root) / name, max_gb * 1e9

    def read(self, digests_N: np.ndarray) -> list[np.ndarray | None]:
        """The logits of each row, (C,) or (P, C), mapped into memory; None where there are none."""
        places: dict[bytes, tuple[np.ndarray, int, tuple[int, ...]]] = {}
        for index in sorted(self._folder.glob("*.npz")):
            try:
                with np.load(index) as part:
                    digests, sizes = part["digests"], part["sizes"]
                flat = np.load(index.with_suffix(".npy"), mmap_mode="r")
            except FileNotFoundError:  # another run has just made room for its own
                continue
            ends = np.cumsum(sizes.prod(axis=1))
            for digest, size, end in zip(digests, sizes, ends, strict=True):
                places[digest.tobytes()] = flat, int(end - size.prod()), tuple(size)
        if places:
            with contextlib.suppress(FileNotFoundError):
                os.utime(self._folder)  # it was of use: others go first when room is needed
        return [_look_up(places, digest.tobytes()) for digest in digests_N]

    def write(self, digests_N: np.ndarray, rows: Sequence[np.ndarray]) -> bool:
        """Adds rows; other teachers, the longest unused first, make room for them.

        Returns False, having written nothing, where all of this teacher's would not fit.
        """
        sizes = np.array([row.shape if row.ndim == 2 else (1, row.size) for row in rows])
        size = 4 * int(sizes.prod(axis=1).sum())
        own = _size(self._folder)
        if own + size > self._max_bytes:
            log.warning(
                "teacher logits of %.3g GB are kept for this run alone: with the %.3g GB there are "
                "they exceed cache.max_gb=%g",
                *(size / 1e9, own / 1e9, self._max_bytes / 1e9),
            )
            return False
        self._make_room(own + size)
        self._folder.mkdir(parents=True, exist_ok=True)
        name = hashlib.blake2b(np.ascontiguousarray(digests_N).data, digest_size=8).hexdigest()
        temporary = self._folder / f"{name}.{os.getpid()}"
        _save(temporary, self._folder / f"{name}.npy", np.save, _flat(rows))
        _save(
            *(temporary, self._folder / f"{name}.npz"),
            lambda file, arrays: np.savez(file, **arrays),
            {"digests": digests_N, "sizes": sizes},
        )
        return True

    def _make_room(self, wanted: int) -> None:
        others = [f for f in self._root.glob("*") if f.is_dir() and f != self._folder]
        others.sort(key=lambda folder: folder.stat().st_mtime)
        used = {folder: _size(folder) for folder in others}
        while used and sum(used.values()) + wanted > self._max_bytes:
            oldest = next(iter(used))
            shutil.rmtree(oldest, ignore_errors=True)
            del used[oldest]


def _look_up(places: dict, digest: bytes) -> np.ndarray | None:
    if digest not in places:
        return None
    flat, start, (answers, classes) = places[digest]
    row = flat[start : start + answers * classes]
    return row if answers == 1 else row.reshape(answers, classes)


def _flat(rows: Iterable[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.asarray(row, np.float32).reshape(-1) for row in rows])


def _save(temporary: Path, path: Path, save: Any, value: Any) -> None:
    with temporary.open("wb") as file:
        save(file, value)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*"))
