"""Reads local files: .txt and .raw (text), .jsonl, .csv, .tsv (with a header line), .parquet,
.json.

A .csv is read as RFC 4180 has it, quotes and all. In a .tsv quotes are characters like any other,
as in GLUE's files, unless the source names its `delimiter`.
"""

import csv
import glob
import itertools
import json
import logging
import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from kd_jax.data import identity
from kd_jax.data.source import Documents, Records, from_lines, from_rows, needed
from kd_jax.errors import UserError

log = logging.getLogger(__name__)

# First bytes of files that are not UTF-8 text, what such a file is, and what to do about it.
_FOREIGN = (
    ((b"\xff\xfe", b"\xfe\xff"), "UTF-16", "convert it: iconv -f utf-16 -t utf-8"),
    ((b"\x00\x05\x16\x07",), "what macOS notes down about another file", "remove it"),
    ((b"\x1f\x8b",), "compressed", "unpack it with gunzip"),
    ((b"PK\x03\x04",), "a zip or an Excel workbook", "unpack it, or save the sheet as CSV"),
)
_HALF = re.compile(r"\\u[dD][89a-fA-F]")  # JSON's escapes for the halves of a character


def documents(spec: dict, where: str) -> Documents:
    """Opens documents of the files, folders (searched to the bottom) and globs in `spec["path"]`,
    file after file in the order of their names.

    Raises UserError when nothing matches, for a file of another kind, for an empty file, for bytes
    that are not UTF-8 and for a row without the column `spec["text"]`, naming file and line.
    """
    name, files = _find(spec, where, (*_TEXT, *_OF_DOCUMENTS))

    def texts(file: Path) -> Iterator[str]:
        if file.suffix in _TEXT:
            return _paragraphs(file)
        records = _RECORDS[file.suffix](file, spec)
        return from_rows(_field(row, spec["text"], place) for place, row in records)

    def read() -> Iterator[str]:
        for file in files:
            found = texts(file)
            first = next(found, None)
            if first is None:
                raise UserError(f"{file} holds no text: remove it from config.{where}.path")
            yield first
            yield from found

    return Documents(name, read, stamp=lambda: identity.of_files(files))


def rows(spec: dict, where: str) -> Records:
    """Opens the rows of the .csv, .tsv, .jsonl, .json (a list of objects) and .parquet files in
    `spec["path"]`; of a .parquet no more than `spec["columns"]`, if these are given and there.
    Raises UserError like `documents`."""
    name, files = _find(spec, where, _RECORDS)

    def read() -> Iterator[tuple[str, dict]]:
        for file in files:
            yield from _RECORDS[file.suffix](file, spec)

    return Records(name, read, stamp=lambda: identity.of_files(files))


def _find(spec: dict, where: str, kinds: Collection[str]) -> tuple[str, list[Path]]:
    """Finds the files of a source: (its paths as one name, the files of these kinds)."""
    paths = [spec["path"]] if isinstance(spec["path"], str | Path) else list(spec["path"])
    return ", ".join(map(str, paths)), [f for path in paths for f in find(path, where, kinds)]


def find(path: str | Path, where: str, kinds: Collection[str]) -> list[Path]:
    """Finds the files of a path (file, glob, or folder, searched to the bottom), sorted.

    Raises UserError where there is none, where a file's suffix is not among `kinds` (of a folder
    other files are skipped), and where one is empty; it names config.<where>.path.
    """
    place, expanded = f"config.{where}.path={str(path)!r}", os.path.expanduser(path)
    have = ", ".join(kinds)
    if os.path.isdir(expanded):
        found = [file for file in visible(Path(expanded)) if file.suffix in kinds]
        if not found:
            raise UserError(f"{place}: no file of this folder is {have} (hidden ones are not read)")
    else:
        matches = [expanded] if os.path.isfile(expanded) else glob.glob(expanded, recursive=True)
        found = [Path(match) for match in matches if os.path.isfile(match)]
        if not found:
            folder = os.path.abspath(os.path.dirname(expanded))
            raise UserError(f"{place}: no such file, looking in {folder}")
    for file in found:
        if file.suffix not in kinds:
            kind = file.suffix or "files without a suffix"
            raise UserError(f"{file}: cannot read {kind}; have: {have}")
        if file.stat().st_size == 0:
            raise UserError(f"{file} is empty: remove it from config.{where}.path")
    return sorted(found)


def visible(folder: Path) -> list[Path]:
    """Lists the files in a folder and its subfolders, sorted, without hidden ones: names that begin
    with a dot, such as .ipynb_checkpoints, and __MACOSX."""

    def hidden(file: Path) -> bool:
        parts = file.relative_to(folder).parts
        return any(part.startswith(".") or part == "__MACOSX" for part in parts)

    return sorted(file for file in folder.rglob("*") if file.is_file() and not hidden(file))


def lines(file: Path) -> Iterator[str]:
    """Reads the lines of a text file, line ends included. UserError names the first byte that is
    not UTF-8, and the encoding or format that the file seems to have."""
    start = 0
    with file.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if number == 1:
                _check_beginning(file, line)
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{file}, line {number}: byte {start + error.start} "
                    f"(0x{line[error.start]:02x}) is not UTF-8; convert the file, "
                    f"for instance: iconv -f latin1 -t utf-8"
                ) from None
            yield text.removeprefix("\ufeff") if number == 1 else text
            start += len(line)


def _check_beginning(file: Path, line: bytes) -> None:
    for beginnings, kind, remedy in _FOREIGN:
        if line.startswith(beginnings):
            raise UserError(f"{file} is {kind}, not text in UTF-8; {remedy}")
    if b"\0" in line[:4]:
        end = "be" if line[:1] == b"\0" else "le"
        raise UserError(
            f"{file} begins with the character NUL: it seems to be UTF-16; convert it: "
            f"iconv -f utf-16{end} -t utf-8"
        )
    if b"\r" in line.rstrip(b"\r") and not line.endswith(b"\n"):
        raise UserError(
            f"{file} is one line, with lone carriage returns in it, which ended lines on old "
            f"Macs; convert it: tr '\\r' '\\n'"
        )


def read_json(file: Path) -> Any:
    """Reads a JSON file. Raises UserError as `parse` does."""
    return parse("".join(lines(file)), str(file))


def parse(text: str, place: str) -> Any:
    """Parses a JSON text; `place` tells messages where it stands. UserError for invalid JSON, for
    an object that has a key twice, and for half of a surrogate pair, which no tokenizer reads."""
    try:
        value = json.loads(text, object_pairs_hook=_object)
        if _HALF.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        before, half = error.object[: error.start][-20:], ord(error.object[error.start])
        raise UserError(
            f"{place} holds half of a character, \\u{half:04x}, after {before!r}, as where an "
            f"emoji was cut in two; remove it"
        ) from None
    except KeyError as error:
        raise UserError(f"{place}: an object has the key {error} twice; remove one") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place} is not JSON: {error}") from None
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise KeyError(next(name for name in names if names.count(name) > 1))
    return found


def check_header(names: Sequence[str], place: str) -> None:
    """Raises UserError where two columns have one name; columns without a name are ignored."""
    twice = next((name for name in names if name and names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{place}: two columns are called {twice!r}; rename or remove one")


def _paragraphs(file: Path) -> Iterator[str]:
    """Reads the documents of a text file: separated by blank lines, or one a line where no blank
    line stands between two texts."""
    groups = itertools.groupby(lines(file), key=lambda line: bool(line.strip()))
    texts = itertools.islice((has_text for has_text, _ in groups if has_text), 2)
    return from_lines(lines(file), blank_lines=sum(texts) == 2)


def _objects(rows: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, dict]]:
    for place, row in rows:
        if not isinstance(row, dict):
            raise UserError(f"{place} is not a JSON object")
        yield place, row


def _jsonl(file: Path, spec: dict) -> Iterator[tuple[str, dict]]:
    numbered = ((f"{file}, line {number}", line) for number, line in enumerate(lines(file), 1))
    return _objects((place, parse(line, place)) for place, line in numbered if line.strip())


def _json(file: Path, spec: dict) -> Iterator[tuple[str, dict]]:
    rows = read_json(file)
    if not isinstance(rows, list):
        raise UserError(f"{file} must hold a list of objects")
    return _objects((f"{file}, row {number}", row) for number, row in enumerate(rows, 1))


def _table(file: Path, spec: dict) -> Iterator[tuple[str, dict]]:
    given = spec.get("delimiter")
    given = "\t" if given == "\\t" else given  # as command lines write it
    if given is not None and (not isinstance(given, str) or len(given) != 1 or given in '"\r\n'):
        raise UserError(f"delimiter={given!r} must be one character, such as ';' or '\\t'")
    return records(file, given, foreign=True)


def records(
    file: Path,
    delimiter: str | None = None,
    header: Sequence[str] = (),
    incomplete: list[str] | None = None,
    foreign: bool = False,
) -> Iterator[tuple[str, dict[str, str]]]:
    """Reads (place, row) of every row of a .csv or .tsv, in which rows are numbered from 1.

    Args:
        delimiter: between fields, which may be quoted; None: a comma in a .csv, or a tab, without
            quoting, in any other file.
        header: names of the columns, where the file does not begin with them.
        incomplete: collects the places of rows with a wrong number of fields; None: such a row is
            an error.
        foreign: the file comes from an unknown program, so warnings and errors suggest settings.
    """
    quoted = delimiter is not None or file.suffix == ".csv"
    number, blank = 0, []
    csv.field_size_limit(2**31 - 1)
    try:
        marked = csv.reader(lines(file), delimiter=delimiter or ",", strict=True)
        rows = enumerate(marked if quoted else _split(file, foreign), 1)
        if not header:
            number, header = next(rows, (1, []))
            check_header(header, f"{file}, row 1")
            if foreign and delimiter is None:
                _check_delimiter(header, file)
        for number, row in rows:
            if not row:  # a blank line, or in a table of one column perhaps an empty cell
                blank += [number] if len(header) == 1 else []
            elif len(row) == len(header):
                yield from ((f"{file}, row {empty}", {header[0]: ""}) for empty in blank)
                blank = []
                yield f"{file}, row {number}", dict(zip(header, row, strict=True))
            elif incomplete is not None:
                incomplete.append(f"{file}, row {number}")
            else:
                hint = "" if quoted or not foreign else _if_quoted(row)
                raise UserError(
                    f"{file}, row {number}: {len(row)} fields instead of {len(header)} "
                    f"({', '.join(header)}){hint}"
                )
    except csv.Error as error:
        raise UserError(f"{file}, row {number + 1}: {error}") from None


def _split(file: Path, warn: bool) -> Iterator[list[str]]:
    for number, line in enumerate(lines(file), 1):
        text = line.rstrip("\r\n")
        row = text.split("\t") if text else []
        if warn and '""' in text and (hint := _if_quoted(row)):
            warn = False
            log.warning("%s, row %d: the quotes are read as they stand%s", file, number, hint)
        yield row


def _if_quoted(row: list[str]) -> str:
    """Explains what to do where a field of a .tsv looks as if pandas had quoted it: in quotes,
    with doubled quotes inside, or broken off at a line's end."""
    for field in row:
        inside = field[1:-1] if field.endswith('"') else field[1:]
        if field.startswith('"') and '"' not in inside.replace('""', ""):
            return "; if fields with quotes or line ends in them were quoted, set delimiter='\\t'"
    return ""


def _check_delimiter(header: list[str], file: Path) -> None:
    other = next((mark for mark in ";\t|" if len(header) == 1 and mark in header[0]), None)
    if other is not None:
        raise UserError(
            f"{file}, row 1: the header is one column, {header[0]!r}; where {other!r} separates "
            f"columns, set delimiter={other!r} next to the path (--delimiter of predict), or write "
            f"the file with {',' if file.suffix == '.csv' else 'tabs'!r}"
        )


def _parquet(file: Path, spec: dict) -> Iterator[tuple[str, dict]]:
    import pyarrow
    import pyarrow.parquet

    column = spec.get("text")
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            check_header(names, str(file))
            names = needed(names, spec.get("columns", ()))
            if column is not None:
                _field(dict.fromkeys(names), column, str(file))
                names = [column]
            batches = table.iter_batches(batch_size=1024, columns=names)
            rows = (row for batch in batches for row in batch.to_pylist())
            yield from ((f"{file}, row {number}", row) for number, row in enumerate(rows, 1))
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is no parquet file, or a damaged one: {error}") from None


def _field(row: dict, column: str, place: str) -> str:
    if column not in row:
        raise UserError(f"{place}: no column {column!r}; set text= to one of: {', '.join(row)}")
    text = "" if row[column] is None else row[column]
    if not isinstance(text, str):
        raise UserError(f"{place}: {column!r} holds {type(text).__name__}, not text")
    return text


# (place, row) of every row of a file; a column that is named is the only one that is needed.
_RECORDS = {
    ".jsonl": _jsonl,
    ".csv": _table,
    ".tsv": _table,
    ".parquet": _parquet,
    ".json": _json,
}
_TEXT = (".txt", ".raw")
_OF_DOCUMENTS = tuple(kind for kind in _RECORDS if kind != ".json")  # which is read whole
