"""Files that are whole or not there: written beside their place, synced to disk, then renamed."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from etils import epath

from kd_jax.errors import UserError


def write(path: epath.PathLike, save: Callable[[BinaryIO], Any]) -> None:
    """Writes a file through `save`, under another name until it is whole and on disk."""
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
    """Writes `value` as JSON, as `write` does."""
    text = json.dumps(value, indent=2, default=str) + "\n"
    write(path, lambda file: file.write(text.encode()))


def read_json(path: epath.PathLike) -> Any:
    """Reads a JSON file that kd_jax wrote. Raises UserError where it is damaged."""
    try:
        return json.loads(epath.Path(path).read_bytes())
    except ValueError as error:  # cut, or not UTF-8
        raise UserError(f"{path}: damaged, it is no JSON ({error}); remove it") from None


def digest(path: epath.PathLike) -> str:
    """Computes the BLAKE2b digest (32 hex digits) of a file's bytes."""
    with epath.Path(path).open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """Lets processes of one machine that lock the same file come one after the other."""
    # Appending and O_NOFOLLOW: a link that somebody else put there is neither followed nor emptied.
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(path, flags, 0o666), "rb+", buffering=0) as stream:
        # Some network file systems have no locks: then two processes may do the same work.
        with contextlib.suppress(OSError):
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield
