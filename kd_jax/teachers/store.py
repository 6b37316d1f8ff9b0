"""Teacher logits on disk, found again by content: computed once, reused over epochs, stages, runs.

A teacher is named after its weights and types (`identity`), a row's logits after what the teacher
reads of it (16 bytes, `Encoded.digests`): tokens, not text, so another tokenizer finds nothing, and
the same row in another order, split or run is found. Rows that were computed together are a part,
an entry of the cache (data/cache.py):

    ROOT/IDENTITY-PART/digests.npy    uint8 (N, 16), of rows
    ROOT/IDENTITY-PART/sizes.npy      int64 (N, 2): answers x classes of each row
    ROOT/IDENTITY-PART/logits.npy     float32, all rows' logits one after another
"""

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kd_jax.data import cache
from kd_jax.errors import UserError
from kd_jax.types import Params

log = logging.getLogger(__name__)


def identity(params: Params, about: Any) -> str:
    """Names a teacher, by 32 hex digits of its weights by path and of `about`, what else its logits
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
        self._root, self._name, self._max_bytes = Path(root), name, max_gb * 1e9
        self._logits: dict[Path, np.ndarray] = {}  # of parts, from their first use on

    def read(self, digests_N: np.ndarray) -> list[np.ndarray | None]:
        """Reads the logits of each row, (C,) or (P, C), mapped into memory; None if there are
        none."""
        places: dict[bytes, tuple[Path, int, np.ndarray]] = {}
        for part in self._parts():
            if arrays := _mapped(part, "digests", "sizes"):
                digests, sizes = map(np.array, arrays)
                ends = np.cumsum(sizes.prod(axis=1))
                for digest, size, end in zip(digests, sizes, ends, strict=True):
                    places[digest.tobytes()] = part, int(end - size.prod()), size
        found = [places.get(digest.tobytes()) for digest in digests_N]
        for part in {place[0] for place in found if place}:
            cache.touch(part)
            if part not in self._logits and (arrays := _mapped(part, "logits")):
                (self._logits[part],) = arrays
        return [self._row(*place) if place else None for place in found]

    def write(self, digests_N: np.ndarray, rows: Sequence[np.ndarray]) -> bool:
        """Adds rows; parts of other teachers, the longest unused first, make room for them.

        Returns False, having written nothing, where all of this teacher's would not fit, or the
        folder cannot be written.
        """
        sizes = np.array([row.shape if row.ndim == 2 else (1, row.size) for row in rows])
        size = 4 * int(sizes.prod(axis=1).sum())
        name = hashlib.blake2b(np.ascontiguousarray(digests_N).data, digest_size=8).hexdigest()

        def save(folder: Path) -> None:
            logits = np.concatenate([np.asarray(row, np.float32).reshape(-1) for row in rows])
            for key, array in (("digests", digests_N), ("sizes", sizes), ("logits", logits)):
                np.save(folder / f"{key}.npy", array)

        setting = "config.cache.folder"
        try:
            wanted = cache.make_room(self._root, size, self._max_bytes, self._parts(), setting)
            if wanted > self._max_bytes:
                raise UserError(
                    f"{wanted / 1e9:.3g} GB of this teacher exceed cache.max_gb="
                    f"{self._max_bytes / 1e9:g}"
                )
            cache.once(self._root / f"{self._name}-{name}", save, setting)
        except UserError as error:
            log.warning("teacher logits are kept for this run alone: %s", error)
            return False
        return True

    def _parts(self) -> list[Path]:
        return cache.entries(self._root, f"{self._name}-*")

    def _row(self, part: Path, start: int, size: np.ndarray) -> np.ndarray | None:
        if part not in self._logits:
            return None
        row = self._logits[part][start : start + size.prod()]
        return row if size[0] == 1 else row.reshape(size)


def _mapped(part: Path, *names: str) -> list[np.ndarray]:
    """Arrays of a part; none where they are damaged, or have just made room."""
    files = [f"{name}.npy" for name in names]
    try:
        there = cache.whole(part, files)
        return [np.load(part / file, mmap_mode="r") for file in files] if there else []
    except FileNotFoundError:
        return []
