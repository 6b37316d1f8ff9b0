"""Opens sources of text: `read` turns a section of the config into documents, `table` into columns.

A source is a dict with these keys (all but `source` and `path` may be left out):

    source    files | hub | tfds | python: the module kd_jax.data.<source>
    path      files: file, folder (without its hidden files) or glob, or a list of them; hub:
              repository id or local folder; tfds: name/config or the folder of a prepared dataset;
              python: nothing, or "reference"
    name      hub: the dataset's configuration
    split     hub, tfds: split of the dataset; by default train, validation or test, as the config
              key that holds the source is called
    text      the column (key, field) that holds the text
    delimiter files: what separates the columns of a .csv or .tsv, whose fields may then be quoted;
              by default a comma (.csv), or a tab, without any quoting (.tsv)
    revision  hub: branch, tag or commit

A module is a source when it defines `documents(spec, where) -> Documents`; with
`rows(spec, where) -> Records` it gives tables too; where that is cheaper, spec["columns"] alone.

What a document is: a row of a table (hub, tfds, .jsonl, .csv, .tsv, .parquet); in a text file,
what stands between blank lines, or each line where a file has no blank lines. WikiText is the
exception, in files and on the hub, where its rows are lines: when the first line that is not
blank is a heading of the first level (" = Title = "), a document is an article, from one such
heading to the next.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from kd_jax import plugins
from kd_jax.data import identity
from kd_jax.data.identity import Identity, Stamp
from kd_jax.errors import UserError
from kd_jax.ranges import settings

DEFAULTS = dict(
    source="files", path=None, name=None, split=None, text="text", delimiter=None, revision=None
)
OF_TABLES = {key: value for key, value in DEFAULTS.items() if key != "text"}

Item = TypeVar("Item")

_HEADING = re.compile(r"= [^=]+ =")


class Source(Generic[Item]):
    """What one source holds; each iteration reads it anew, in the same order."""

    settings = ""  # of the config
    seen: Stamp | None = None  # the stamp of what its identity was found from

    def __init__(
        self,
        name: str,
        read: Callable[[], Iterator[Item]],
        commit: str | None = None,
        stamp: Callable[[], Stamp | None] | None = None,
    ) -> None:
        """Takes how to read it, and what changes whenever its contents do (data/identity.py)."""
        self.name = name  # for messages and the run's manifest
        self.commit = commit  # of a hub repository
        self.stamp = stamp
        self._read = read

    def __iter__(self) -> Iterator[Item]:
        return self._read()


class Records(Source[tuple[str, dict[str, Any]]]):
    """The rows of one source: pairs of where a row stands ("train.csv, row 7") and its columns."""


class Documents(Source[str]):
    """The documents of one source."""

    root: Path | None = None  # the cache folder that remembers their identity

    @functools.cached_property
    def identity(self) -> Identity:
        """Hashes and counts the documents; reads everything unless the cache remembers it."""
        return identity.remembered(self, "documents", self._digest, self.root)

    def _digest(self) -> Identity:
        digest, count = hashlib.blake2b(digest_size=16), 0
        for document in identity.watched(self, f"reading {self.name}"):
            count += 1
            text = document.encode()
            digest.update(len(text).to_bytes(8, "little"))
            digest.update(text)
        return Identity(digest.hexdigest(), count)

    @property
    def digest(self) -> str:
        return self.identity.digest

    def part(self, chosen: np.ndarray, name: str) -> "Documents":
        """Selects the documents where the bool array `chosen` is True."""
        part = Documents(name, lambda: itertools.compress(self, chosen), self.commit, self.stamp)
        digest = hashlib.blake2b(np.packbits(chosen).tobytes(), digest_size=16)
        digest.update(self.identity.digest.encode())
        # Derived from the whole's identity, so that the documents are not read again.
        part.identity, part.seen = Identity(digest.hexdigest(), int(chosen.sum())), self.seen
        return part


@dataclasses.dataclass(frozen=True)
class Table:
    """The columns of a split, all of one length."""

    name: str  # for messages and the run's manifest
    columns: dict[str, list]
    place: Callable[[int], str]  # where row i stands, for messages: "train.csv, row 7"
    commit: str | None = None  # of a hub repository

    @classmethod
    def of_records(
        cls, name: str, records: Iterable[tuple[str, dict]], commit: str | None = None
    ) -> "Table":
        """Makes a table of (place, row) pairs. Raises UserError where there are none, and where a
        row has other columns than the first one."""
        places, columns = [], {}
        for place, row in records:
            columns = columns if places else {column: [] for column in row}
            if row.keys() != columns.keys():
                raise UserError(
                    f"{place} has the columns {', '.join(row)}; before it they were: "
                    f"{', '.join(columns)}"
                )
            places.append(place)
            for column, value in row.items():
                columns[column].append(value)
        if not places:
            raise UserError(f"{name} holds no rows")
        return cls(name, columns, places.__getitem__, commit)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), []))

    def column(self, name: str, key: str) -> list:
        """Returns a column's values. If it is missing, UserError lists the columns and names `key`,
        the config key to set."""
        if name not in self.columns:
            raise UserError(
                f"{self.name} has no column {name!r}; set {key} to one of: "
                f"{', '.join(self.columns)}"
            )
        return self.columns[name]

    def texts(self, name: str, key: str) -> list[str]:
        """Returns a column of texts. UserError names the first row that is not a text."""
        values = self.column(name, key)
        for row, value in enumerate(values):
            if not isinstance(value, str):
                raise UserError(f"{self.place(row)}: {name!r} holds {value!r}, not text")
        return values

    def lists(self, name: str, key: str) -> list[list[str]]:
        """Returns a column of lists of texts. UserError names the first row that is not one."""
        values = self.column(name, key)
        for row, texts in enumerate(values):
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                raise UserError(f"{self.place(row)}: {name} is {texts!r}, not a list of texts")
        return values


def read(config: Mapping, where: str, root: Path | None = None) -> Documents:
    """Opens the documents of the source `config`, the section config.<where> (say "data.train").

    Reads the first document, so that most mistakes show at once; with a cache folder `root` all of
    them, unless it remembers them. Raises UserError for whatever is wrong with the config or the
    source.
    """
    found = _open(config, where, DEFAULTS, "documents")
    found.root = root
    if not found.identity.count if root else next(iter(found), None) is None:
        raise UserError(f"{found.name} (config.{where}) holds no text")
    return found


def table(config: Mapping, where: str) -> Table:
    """Reads the table of the source `config`, the section config.<where>. UserError as `read`."""
    found = records(config, where)
    return Table.of_records(found.name, found, found.commit)


def records(config: Mapping, where: str, *columns: str) -> Records:
    """Opens the rows of the source `config`, the section config.<where>; other columns than
    `columns`, if these are given, may be missing. UserError as `read`, while they are read."""
    return _open(config, where, OF_TABLES, "rows", columns=columns)


def _open(config: Mapping, where: str, defaults: dict[str, Any], kind: str, **more: Any) -> Any:
    """Imports a source's module and calls its function `kind` ("documents" or "rows")."""
    spec = settings(config, defaults, where) | more
    spec["split"] = spec["split"] or where.rsplit(".", 1)[-1]
    module = plugins.load("data", spec["source"], kind)
    if spec["path"] is None and spec["source"] != "python":
        raise UserError(f"config.{where}.path is not set: source {spec['source']!r} needs it")
    found = getattr(module, kind)(spec, where)
    found.settings = json.dumps(spec, sort_keys=True, default=str)
    return found


def check_text(name: str, columns: Mapping[str, bool], column: str, where: str) -> None:
    """Raises UserError where a data set lacks a column, or its values are not text; `columns` maps
    each column's name to whether it holds text."""
    if not columns.get(column):
        what = f"no text in {column!r}" if column in columns else f"no column {column!r}"
        have = ", ".join(each for each, text in columns.items() if text)
        raise UserError(f"{name} has {what}; set config.{where}.text to one of: {have}")


def needed(names: Sequence[str], columns: Sequence[str]) -> list[str]:
    """Lists those of a table's columns that are among `columns`; all of them if none are asked for,
    or if the first is not there, so that the message about it can list them."""
    given = columns and columns[0] in names
    return [name for name in names if not given or name in columns]


def blank(text: str) -> bool:
    """Tells whether a text has only white space, control and zero-width characters."""
    return not any(char.isprintable() and not char.isspace() for char in text)


def from_rows(rows: Iterable[str]) -> Iterator[str]:
    """Makes documents of rows: one for each row that is not blank, or WikiText's articles."""
    rows = (row for row in rows if row.strip())
    first = next(rows, "")
    if _HEADING.fullmatch(first.strip()):
        yield from _articles(first, rows)
    elif first:
        yield first
        yield from rows


def from_lines(lines: Iterable[str], blank_lines: bool) -> Iterator[str]:
    """Makes documents of a text file's lines; `blank_lines` tells whether blank lines stand between
    its first and its last text."""
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
