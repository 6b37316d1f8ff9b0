"""Stores logits on disk by content: computed once, reused over epochs, stages and runs.

The model, or the mean of several, that computed them has a name (`identity`); a row is identified
by 16 bytes, a hash of the model's input: of tokens, not text, so that the same row is found in
another order, split or run, but not with another tokenizer. Rows that were computed together are an
entry of the cache (data/cache.py):

    ROOT/NAME-ENTRY/digests.npy    uint8 (N, 16), of rows
    ROOT/NAME-ENTRY/sizes.npy      int64 (N, 2): positions x logits of each row
    ROOT/NAME-ENTRY/logits.npy     float32, all rows' logits one after another
    ROOT/NAME-ENTRY/ids.npy        int32, the ids of the logits; missing if all logits are kept
    ROOT/NAME-ENTRY/rest.npy       float32, at each position: the logit of each of the other ids
"""

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kd_jax.data import cache
from kd_jax.errors import UserError
from kd_jax.types import Params, StoredLogits

SETTING = "config.cache.folder"
NOT_FINITE = "its weights hold NaN or infinity, or are too large for config.precision"


def identity(params: Params, about: Any, gather: Callable[[Any], np.ndarray] = np.asarray) -> str:
    """Names a model by 32 hex digits, a hash of its parameters and of `about`, the other things
    that its logits depend on (architecture, types); `gather` makes a whole array of a parameter."""
    digest = hashlib.blake2b(repr(about).encode(), digest_size=16)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(gather(leaf)).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


class LogitStore:
    """The stored logits of one model, or of the mean of several."""

    def __init__(self, root: Path, name: str, max_gb: float, vocab_size: int | None = None):
        """Opens the logits of the model `name` under `root`, of which all entries together take at
        most `max_gb`; ids are below `vocab_size`."""
        self.name, self._root, self._max_bytes = name, Path(root), max_gb * 1e9
        self._vocab_size = vocab_size
        # (entry, first logit, (positions, logits of each)) by the row's digest.
        self._places: dict[bytes, tuple[Path, int, tuple[int, int]]] = {}
        self._arrays: dict[Path, list[np.ndarray]] = {}  # of entries, from their first use on

    def read(self, digests: Sequence[bytes]) -> list[StoredLogits | None]:
        """Reads the logits of each row, (P, K), memory-mapped; None for rows that are missing."""
        if not self._places.keys() >= set(digests):
            self._look()
        return [self._row(digest) for digest in digests]

    def write(
        self,
        digests: Sequence[bytes],
        sizes: Sequence[tuple[int, int]],
        rows: Iterable[StoredLogits],
        others: Sequence["LogitStore"] = (),
    ) -> None:
        """Stores logits of rows; `sizes` has positions and logits of each. If room is needed, the
        least recently used entries are removed, but none that this store or `others` have read.

        Programs of one machine that write the same rows wait for the first, and use its entry.
        Raises UserError if `max_gb` is too small, or the folder cannot be written.
        """
        positions, logits = _totals(sizes)
        size = 4 * (2 * logits + positions if self._sparse(sizes[0][1]) else logits)
        used = {entry for store in (self, *others) for entry in store._arrays}
        wanted = cache.make_room(self._root, size, self._max_bytes, used, SETTING)
        if wanted > self._max_bytes:
            raise UserError(
                f"logits on disk: {wanted / 1e9:.3g} GB are wanted in {self._root}, "
                f"config.cache.max_gb={self._max_bytes / 1e9:g}; raise it, or keep fewer rows, or "
                f"fewer logits of each (top_k)"
            )
        save = functools.partial(_save, digests=digests, sizes=sizes, rows=rows)
        cache.once(self._entry(digests), save, SETTING)

    def remove(self, digests: Sequence[bytes]) -> None:
        """Removes the entry with these rows, if it exists."""
        cache.remove(self._entry(digests), SETTING)

    def _entry(self, digests: Sequence[bytes]) -> Path:
        name = hashlib.blake2b(b"".join(digests), digest_size=8).hexdigest()
        return self._root / f"{self.name}-{name}"

    def _look(self) -> None:
        """Looks for new entries, and notes their rows."""
        known = {entry for entry, *_ in self._places.values()}
        for entry in cache.entries(self._root, f"{self.name}-*"):
            if entry not in known and (arrays := _mapped(entry, "digests", "sizes")):
                start = 0
                for digest, size in zip(*arrays, strict=True):
                    self._places[digest.tobytes()] = entry, start, tuple(size.tolist())
                    start += int(size.prod())

    def _row(self, digest: bytes) -> StoredLogits | None:
        if digest not in self._places:
            return None
        entry, start, shape = self._places[digest]
        positions, k = shape
        if entry not in self._arrays and not self._open(entry, self._sparse(k)):
            return None
        logits, *more = self._arrays[entry]
        own = slice(start, start + positions * k)
        if not more:
            return StoredLogits(logits[own].reshape(shape))
        ids, rest = more
        first = start // k
        return StoredLogits(
            logits[own].reshape(shape), ids[own].reshape(shape), rest[first : first + positions]
        )

    def _sparse(self, k: int) -> bool:
        """Tells whether k logits of each position are fewer than all."""
        return self._vocab_size is not None and k < self._vocab_size

    def _open(self, entry: Path, sparse: bool) -> bool:
        """Maps the logits of an entry into memory; forgets its rows if it is damaged or removed."""
        arrays = _mapped(entry, "logits", *(("ids", "rest") if sparse else ()))
        if not arrays:
            self._places = {key: each for key, each in self._places.items() if each[0] != entry}
            return False
        if sparse:
            cache.check_ids(arrays[1], self._vocab_size, entry)
        cache.touch(entry)
        self._arrays[entry] = arrays
        return True


def _mapped(entry: Path, *names: str) -> list[np.ndarray]:
    """Maps arrays of an entry into memory; returns none if they are damaged, or just removed."""
    files = [f"{name}.npy" for name in names]
    try:
        there = cache.whole(entry, files)
        return [np.asarray(np.load(entry / file, mmap_mode="r")) for file in files if there]
    except FileNotFoundError:
        return []


def _totals(sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Counts the positions, and the logits, of all rows."""
    sizes_N2 = np.asarray(sizes, np.int64)
    return int(sizes_N2[:, 0].sum()), int(sizes_N2.prod(axis=1).sum())


def _save(
    folder: Path,
    digests: Sequence[bytes],
    sizes: Sequence[tuple[int, int]],
    rows: Iterable[StoredLogits],
) -> None:
    positions, logits = _totals(sizes)
    totals = {"logits": logits, "ids": logits, "rest": positions}
    with contextlib.ExitStack() as stack:
        files: dict[str, Any] = {}
        for _, row in zip(sizes, rows, strict=True):
            arrays = {"logits": row.values_BPK, "ids": row.ids_BPK, "rest": row.rest_BP}
            for name, array in arrays.items():
                if array is None:
                    continue
                if name not in files:
                    files[name] = stack.enter_context((folder / f"{name}.npy").open("wb"))
                    about = {"descr": array.dtype.str, "fortran_order": False}
                    about["shape"] = (totals[name],)
                    np.lib.format.write_array_header_1_0(files[name], about)
                files[name].write(np.ascontiguousarray(array).data)
    np.save(folder / "digests.npy", np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 16))
    np.save(folder / "sizes.npy", np.asarray(sizes, np.int64))
