"""Documents: text that can be read again and again, its fingerprint, and parts of it.

What a document is: a row of a table (hub, tfds, .jsonl, .csv, .tsv, .parquet); in a text file,
what stands between blank lines, or each line where a file has no blank lines. WikiText is the
exception, in files and on the hub, where its rows are lines: when the first line that is not
blank is a heading of the first level (" = Title = "), a document is an article, from one such
heading to the next.
"""

import functools
import hashlib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

_HEADING = re.compile(r"= [^=]+ =")


class Identity(NamedTuple):
    """What tells one text from another: a hash of all documents, and how many there are."""

    digest: str
    count: int


class Documents:
    """Documents of one source, read anew by every iteration, in a fixed order."""

    def __init__(
        self, name: str, read: Callable[[], Iterator[str]], commit: str | None = None
    ) -> None:
        self.name = name  # for messages and the run's manifest
        self.commit = commit  # of a hub repository
        self._read = read

    def __iter__(self) -> Iterator[str]:
        return self._read()

    @functools.cached_property
    def identity(self) -> Identity:
        """Reads everything once."""
        digest, count = hashlib.blake2b(digest_size=16), 0
        for document in self:
            count += 1
            text = document.encode()
            digest.update(len(text).to_bytes(8, "little"))
            digest.update(text)
        return Identity(digest.hexdigest(), count)

    @property
    def digest(self) -> str:
        return self.identity.digest

    def part(self, chosen: np.ndarray, name: str) -> "Documents":
        """The documents where the bool array `chosen` is True."""
        part = Documents(name, lambda: itertools.compress(self, chosen), self.commit)
        digest = hashlib.blake2b(np.packbits(chosen).tobytes(), digest_size=16)
        digest.update(self.identity.digest.encode())
        part.identity = Identity(digest.hexdigest(), int(chosen.sum()))  # no need to read again
        return part


def from_rows(rows: Iterable[str]) -> Iterator[str]:
    """Every row that is not blank, or WikiText's articles."""
    rows = (row for row in rows if row.strip())
    first = next(rows, "")
    if _HEADING.fullmatch(first.strip()):
        yield from _articles(first, rows)
    elif first:
        yield first
        yield from rows


def from_lines(lines: Iterable[str], blank_lines: bool) -> Iterator[str]:
    """Documents of a text file; `blank_lines` tells whether it has lines between its first and
    its last text that are blank."""
    lines = itertools.dropwhile(lambda line: not line.strip(), lines)
    first = next(lines, "")
    lines = itertools.chain([first], lines)
    if not blank_lines or _HEADING.fullmatch(first.strip()):
        yield from from_rows(line.rstrip() for line in lines)
        return
    for has_text, group in itertools.groupby(lines, key=lambda line: bool(line.strip())):
        if has_text:
            yield "\n".join(line.rstrip() for line in group)


def _articles(first: str, lines: Iterable[str]) -> Iterator[str]:
    article = [first.strip()]
    for line in map(str.strip, lines):
        if _HEADING.fullmatch(line):
            yield "\n".join(article)
            article = []
        article.append(line)
    yield "\n".join(article)
