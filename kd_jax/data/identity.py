"""Remembers what a source holds by its digest, so that it is read once and not at every start.

The cache keeps the digest and the count next to the tokens, in an entry named after the source's
settings and its stamp: path, size and time of change of each file, or the commit of a hub
repository. Under the same stamp they are trusted. Under another one everything is read again; if
only the stamp had changed, the digest is the same, and so are the tokens that are found by it.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from kd_jax import storage
from kd_jax.data import cache
from kd_jax.errors import UserError

if TYPE_CHECKING:
    from kd_jax.data.source import Source

log = logging.getLogger(__name__)

Item = TypeVar("Item")

_VERSION = 1  # raise it when sources are read otherwise
_FRESH = 2.0  # seconds within which a file may change twice at one time, as file systems tell it
_EVERY = 30.0  # seconds between two lines about a long pass


class FileStamp(NamedTuple):
    """A file, and what changes with its contents."""

    path: str
    size: int
    changed: int  # nanoseconds since 1970


Stamp = tuple[FileStamp | str, ...]


class Identity(NamedTuple):
    """The identity of a source's contents: a hash of all of it, and how many documents or rows."""

    digest: str
    count: int


def of_files(files: Iterable[str | Path]) -> Stamp:
    """Makes the stamp of files."""
    found = []
    for file in map(os.path.abspath, files):
        about = os.stat(file)
        found.append(FileStamp(file, about.st_size, about.st_mtime_ns))
    return tuple(found)


def remembered(
    source: Source, kind: str, compute: Callable[[], Identity], root: Path | None
) -> Identity:
    """Takes the identity of a source from the cache folder `root`, or computes and keeps it there.

    `kind` tells what of the source is hashed. A source without a stamp, or with a file that changed
    just now, is read every time. Raises UserError where it changes meanwhile.
    """
    source.seen = stamp = source.stamp and source.stamp()
    if root is None or stamp is None or any(map(_is_fresh, stamp)):
        return compute()
    entry = root / f"source-{cache.key(_VERSION, kind, source.settings, *stamp)}"
    if root.exists() and not os.access(root, os.W_OK) and not cache.whole(entry):
        return compute()  # the tokens may be there all the same, made by an earlier version

    def write(folder: Path) -> None:
        found = compute()
        check_unchanged(source)
        storage.write_json(folder / "identity.json", list(found))

    cache.once(entry, write, "config.data.cache_dir")
    return Identity(*storage.read_json(entry / "identity.json"))


def check_unchanged(source: Source) -> None:
    """Raises UserError if a source has another stamp now than when its identity was found."""
    if source.stamp and source.stamp() != source.seen:
        raise UserError(f"{source.name} was changed while it was read: run the command again")


def _is_fresh(part: FileStamp | str) -> bool:
    return isinstance(part, FileStamp) and abs(time.time() - part.changed / 1e9) < _FRESH


def watched(items: Iterable[Item], what: str, total: int | None = None) -> Iterator[Item]:
    """Passes items through, and logs every half minute how far they are."""
    told = time.monotonic()
    for count, item in enumerate(items):
        if time.monotonic() - told > _EVERY:
            told += _EVERY
            log.info("%s: %s%s", what, f"{count:,}", f" of {total:,}" if total else "")
        yield item
