"""Writes files completely or not at all: under another name, flushed to disk, then renamed."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import itertools
import json
import logging
import math
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash
from etils import epath

from kd_jax.errors import UserError

log = logging.getLogger(__name__)


def write(path: epath.PathLike, save: Callable[[BinaryIO], Any]) -> None:
    """Writes a file by calling `save`, under another name until it is complete and on disk."""
    path = epath.Path(path)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with unfinished.open("wb") as file:
            save(file)
            file.flush()
            with contextlib.suppress(OSError, AttributeError):  # files on gs:// have no number
                os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_json(path: epath.PathLike, value: Any) -> None:
    """Writes `value` as JSON, as `write` does. An object gets a key "digest", a hash of the others;
    NaN and infinity, which JSON lacks, become null."""
    value = finite(value)
    if isinstance(value, dict):
        value = value | {"digest": digest_of(value)}
    text = json.dumps(value, indent=2, default=str) + "\n"
    write(path, lambda file: file.write(text.encode()))


def read_json(path: epath.PathLike) -> Any:
    """Reads a JSON file, without its key "digest". Raises UserError if it is damaged."""
    try:
        value = json.loads(epath.Path(path).read_bytes())
    except ValueError as error:  # cut, or not UTF-8
        raise UserError(f"{path}: damaged, it is no JSON ({error}); remove it") from None
    if isinstance(value, dict) and "digest" in value:
        if value.pop("digest") != digest_of(value):
            raise UserError(
                f"{path}: damaged, it is not what was written; restore or remove it (or, where you "
                f"edited it, its key 'digest')"
            )
    return value


def digest_of(value: dict) -> str:
    """Computes the digest (16 hex digits) of an object of JSON values."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def finite(value: Any) -> Any:
    """Replaces NaN and infinity by None in nested lists and dicts."""
    if isinstance(value, dict):
        return {str(key): finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def digest(path: epath.PathLike) -> str:
    """Computes the XXH3 digest (32 hex digits) of a file's bytes: fast, against damage, not against
    forgery."""
    with epath.Path(path).open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """Locks a file during the block: processes of one machine run it one after the other."""
    # Appending and O_NOFOLLOW: a link that somebody else put there is neither followed nor emptied.
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(path, flags, 0o666), "rb+", buffering=0) as stream:
        # Some network file systems have no locks: then two processes may do the same work.
        with contextlib.suppress(OSError):
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


class Hold:
    """A lock that this process holds until it is released."""

    def __init__(self, number: int):
        self._number: int | None = number  # of the open file

    def release(self) -> None:
        """Releases the lock; the file does not name this process any more."""
        os.ftruncate(self._number, 0)
        self.__del__()

    def __del__(self) -> None:
        if self._number is not None:
            os.close(self._number)
            self._number = None


def hold(path: epath.PathLike) -> Hold | None:
    """Locks a file, and writes into it which process holds the lock.

    Returns None if the file system has no locks, or this process holds the lock already. Raises
    UserError if another process does. Some shared file systems carry locks to other hosts.
    """
    number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    own, host = f"process {os.getpid()} on ", socket.gethostname()
    holder = os.pread(number, 200, 0).decode(errors="replace")
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(number)
        if holder == own + host or not isinstance(error, BlockingIOError):
            return None
        raise UserError(
            f"{Path(path).parent} is in use by {holder or 'another process'}: wait for it or stop "
            f"it, or give another --workdir"
        ) from None
    if holder and not holder.endswith(f" on {host}"):
        log.warning(
            "%s was left by %s, which did not end as it should: if it still runs, stop it, since "
            "not every file system has locks between hosts",
            *(Path(path).parent, holder),
        )
    os.ftruncate(number, 0)
    os.pwrite(number, (own + host).encode(), 0)
    return Hold(number)


def set_aside(path: epath.Path, folder: epath.Path) -> epath.Path:
    """Moves a file or folder into `folder`, with a number behind its name if that is taken."""
    folder.mkdir(parents=True, exist_ok=True)
    place, number = folder / path.name, 1
    while place.exists():
        number += 1
        place = folder / f"{path.name}-{number}"
    path.rename(place)
    return place


class Lines:
    """A file of JSON lines that is written in parts, and gets its name when it is complete.

    Until then its lines are in NAME.partial, where a program that makes the same ones goes on;
    others begin anew. A line that an interruption cut is made again.
    """

    def __init__(self, path: Path, about: dict, group: int = 1) -> None:
        """Opens the file; `about` tells all that its lines depend on. Of the lines that are there,
        the first `count` are kept, a multiple of `group`."""
        self.path, self.partial = path, path.with_name(f"{path.name}.partial")
        path.parent.mkdir(parents=True, exist_ok=True)
        first = json.dumps({"lines of": digest_of(about)}).encode() + b"\n"
        lines = self.partial.read_bytes().splitlines(True) if self.partial.exists() else []
        same = lines[:1] == [first]
        whole = list(itertools.takewhile(_is_json, lines[1:])) if same else []
        self.count = len(whole) // group * group
        write(self.partial, lambda file: file.writelines([first, *whole[: self.count]]))

    def append(self, rows: Sequence[Any]) -> None:
        """Writes rows, which are on disk when this returns."""
        with self.partial.open("ab") as file:
            file.writelines(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())

    def finish(self) -> None:
        """Gives the file its name."""
        with self.partial.open("rb") as lines:
            lines.readline()
            write(self.path, functools.partial(shutil.copyfileobj, lines))
        self.partial.unlink()


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return line.endswith(b"\n")


class Arrays:
    """The arrays that an unfinished program has made, in files of NAME.partial.

    A file is named after its array's number and hash: one that is not what was written is made
    again. Those of a program that makes others are removed.
    """

    def __init__(self, path: Path, about: dict) -> None:
        """Opens the folder beside `path`; `about` tells all that the arrays depend on."""
        self.folder = path.with_name(f"{path.name}.partial")
        mark = self.folder / f"of-{digest_of(about)}"
        if not mark.exists():
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            mark.touch()

    def read(self, number: int) -> np.ndarray | None:
        """Reads an array; None if it is missing or damaged."""
        for path in self.folder.glob(f"{number:012}-*.npy"):
            with contextlib.suppress(OSError, ValueError):
                array = np.load(path)
                if path == self._path(number, array):
                    return array
            log.warning("%s is damaged: what it held is made again", path)
            path.unlink()
        return None

    def write(self, number: int, array: np.ndarray) -> None:
        """Keeps an array, which is on disk when this returns."""
        write(self._path(number, array), lambda file: np.save(file, array, allow_pickle=False))

    def _path(self, number: int, array: np.ndarray) -> Path:
        found = xxhash.xxh3_64_hexdigest(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        return self.folder / f"{number:012}-{found}.npy"
