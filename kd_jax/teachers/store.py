"""Stores logits on disk by content: computed once, reused over epochs, stages and runs.

The model, or the mean of several, that computed them has a name (`identity`); a row is identified
by 16 bytes, a hash of the model's input: of tokens, not text, so that the same row is found in
another order, split or run, but not with another tokenizer. Rows that were computed together are an
entry of the cache (data/cache.py):

    ROOT/NAME-ENTRY/digests.npy    uint8 (N, 16), of rows
    ROOT/NAME-ENTRY/sizes.npy      int64 (N, 2): positions x logits of each row
    ROOT/NAME-ENTRY/logits.npy     float32, all rows' logits one after another; missing for draws
    ROOT/NAME-ENTRY/ids.npy        the ids of the logits, or those drawn: uint16, or int32 where a
                                   vocabulary has more; missing if all logits are kept
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

    def __init__(
        self,
        root: Path,
        name: str,
        max_gb: float,
        vocab_size: int | None = None,
        drawn: bool = False,
    ):
        """Opens the logits of the model `name` under `root`, of which all entries together take at
        most `max_gb`; ids are below `vocab_size`, and `drawn` or those of the largest logits."""
        self.name, self._root, self._max_bytes = name, Path(root), max_gb * 1e9
        self._vocab_size, self._drawn = vocab_size, drawn
        # (entry, first logit, (positions, logits of each)) by the row's digest.
        self._places: dict[bytes, tuple[Path, int, tuple[int, int]]] = {}
        self._arrays: dict[Path, dict[str, np.ndarray]] = {}  # of entries, from their first use on

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
        size = bytes_of(positions, logits, self._names(sizes[0][1]), self._vocab_size)
        used = {entry for store in (self, *others) for entry in store._arrays}
        wanted = cache.make_room(self._root, size, self._max_bytes, used, SETTING)
        if wanted > self._max_bytes:
            raise UserError(
                f"logits on disk: {wanted / 1e9:.3g} GB are wanted in {self._root}, "
                f"config.cache.max_gb={self._max_bytes / 1e9:g}; raise it, or keep fewer rows, or "
                f"fewer logits of each (top_k)"
            )
        ids = id_type(self._vocab_size)
        save = functools.partial(_save, digests=digests, sizes=sizes, rows=rows, ids=ids)
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
        if entry not in self._arrays and not self._open(entry, self._names(k)):
            return None
        arrays = self._arrays[entry]
        own, first = slice(start, start + positions * k), start // k
        logits, ids = (
            arrays[name][own].reshape(shape) if name in arrays else None
            for name in ("logits", "ids")
        )
        rest = arrays["rest"][first : first + positions] if "rest" in arrays else None
        return StoredLogits(logits, ids, rest)

    def _names(self, k: int) -> tuple[str, ...]:
        return names_of(k, self._vocab_size, self._drawn)

    def _open(self, entry: Path, names: tuple[str, ...]) -> bool:
        """Maps the logits of an entry into memory; forgets its rows if it is damaged or removed."""
        arrays = dict(zip(names, _mapped(entry, *names), strict=False))
        if not arrays:
            self._places = {key: each for key, each in self._places.items() if each[0] != entry}
            return False
        if "ids" in arrays:
            cache.check_ids(arrays["ids"], self._vocab_size, entry)
        cache.touch(entry)
        self._arrays[entry] = arrays
        return True


def names_of(k: int, vocab_size: int | None, drawn: bool) -> tuple[str, ...]:
    """Names the arrays that are stored for k logits, or draws, of each position."""
    if drawn:
        return ("ids",)
    if vocab_size is None or k == vocab_size:
        return ("logits",)
    return ("logits", "ids", "rest")


def id_type(vocab_size: int | None) -> np.dtype:
    """Returns the type in which ids below `vocab_size` are stored."""
    return np.dtype(np.uint16 if vocab_size is not None and vocab_size <= 1 << 16 else np.int32)


def bytes_of(positions: int, logits: int, names: Sequence[str], vocab_size: int | None) -> int:
    """Computes the bytes on disk of the arrays `names` of so many positions and logits."""
    sizes = {"logits": 4 * logits, "rest": 4 * positions}
    sizes["ids"] = id_type(vocab_size).itemsize * logits
    return sum(sizes[name] for name in names)


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
    ids: np.dtype,
) -> None:
    positions, logits = _totals(sizes)
    totals = {"logits": logits, "ids": logits, "rest": positions}
    with contextlib.ExitStack() as stack:
        files: dict[str, Any] = {}
        for _, row in zip(sizes, rows, strict=True):
            arrays = {"logits": row.values_BPK, "ids": row.ids_BPK, "rest": row.rest_BP}
            if row.ids_BPK is not None:
                arrays["ids"] = np.asarray(row.ids_BPK, ids)
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
