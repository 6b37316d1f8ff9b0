"""Local files: .txt and .raw (text), .jsonl, .csv, .tsv (with a header line), .parquet, .json.

A .csv is read as RFC 4180 has it, quotes and all. In a .tsv quotes are characters like any other,
as in GLUE's files, unless the source names its `delimiter`.
"""

import csv
import glob
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kd_jax.data.source import Documents, Table, from_lines, from_rows
from kd_jax.errors import UserError

log = logging.getLogger(__name__)

# How a file begins that is no text in UTF-8, what it is, and what to do about it.
_FOREIGN = (
    ((b"\xff\xfe", b"\xfe\xff"), "UTF-16", "convert it: iconv -f utf-16 -t utf-8"),
    ((b"\x00\x05\x16\x07",), "what macOS notes down about another file", "remove it"),
    ((b"\x1f\x8b",), "compressed", "unpack it with gunzip"),
    ((b"PK\x03\x04",), "a zip or an Excel workbook", "unpack it, or save the sheet as CSV"),
)
_HALF = re.compile(r"\\u[dD][89a-fA-F]")  # JSON's escapes for the halves of a character


def documents(spec: dict, where: str) -> Documents:
    """Documents of the files, folders (searched to the bottom) and globs in `spec["path"]`,
    file after file in the order of their names.

    Raises UserError when nothing matches, for a file of another kind, for an empty file, for bytes
    that are not UTF-8 and for a row without the column `spec["text"]`, naming file and line.
    """
    paths = [spec["path"]] if isinstance(spec["path"], (str, Path)) else list(spec["path"])
    files = [file for path in paths for file in _find(str(path), where, _READERS)]

    def read() -> Iterator[str]:
        for file in files:
            count = 0
            for text in _READERS[file.suffix](file, spec):
                count += 1
                yield text
            if not count:
                raise UserError(f"{file} holds no text: remove it from config.{where}.path")

    return Documents(", ".join(map(str, paths)), read)


def rows(spec: dict, where: str) -> Table:
    """All columns of the .csv, .tsv, .jsonl, .json (a list of objects) and .parquet files in
    `spec["path"]`. Raises UserError like `documents`, and where rows differ in their columns."""
    paths = [spec["path"]] if isinstance(spec["path"], (str, Path)) else list(spec["path"])
    files = [file for path in paths for file in _find(str(path), where, _RECORDS)]
    records = (record for file in files for record in _RECORDS[file.suffix](file, spec))
    return Table.of_records(", ".join(map(str, paths)), records)


def _find(path: str, where: str, readers: Mapping) -> list[Path]:
    expanded = os.path.expanduser(path)
    kinds = ", ".join(readers)
    if os.path.isdir(expanded):
        files = [file for file in visible(Path(expanded)) if file.suffix in readers]
        if not files:
            raise UserError(
                f"config.{where}.path={path!r}: no file of this folder is {kinds} (hidden ones are "
                f"not read)"
            )
    elif os.path.isfile(expanded):
        files = [Path(expanded)]
    else:
        files = [Path(match) for match in glob.glob(expanded, recursive=True)]
        files = [file for file in files if file.is_file()]
        if not files:
            folder = os.path.abspath(os.path.dirname(expanded))
            raise UserError(f"config.{where}.path={path!r}: no such file, looking in {folder}")
    for file in files:
        if file.suffix not in readers:
            raise UserError(
                f"{file}: cannot read {file.suffix or 'files without a suffix'}; have: {kinds}"
            )
        if file.stat().st_size == 0:
            raise UserError(f"{file} is empty: remove it from config.{where}.path")
    return sorted(files)


def visible(folder: Path) -> list[Path]:
    """The files of a folder and those below it, sorted, without what programs leave behind for
    themselves: names that begin with a dot, such as .ipynb_checkpoints, and __MACOSX."""

    def hidden(file: Path) -> bool:
        parts = file.relative_to(folder).parts
        return any(part.startswith(".") or part == "__MACOSX" for part in parts)

    return sorted(file for file in folder.rglob("*") if file.is_file() and not hidden(file))


def lines(file: Path) -> Iterator[str]:
    """Lines with their ends; UserError names the first byte that is not UTF-8, and says what a file
    of another encoding is."""
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


def parse(text: str, place: str) -> Any:
    """The value of a JSON text, which stands at `place`. UserError for what is no JSON, for an
    object that has a key twice, and for half of a character, which no tokenizer reads."""
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
    """Raises UserError where two columns have one name; those without any are nobody's."""
    twice = next((name for name in names if name and names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{place}: two columns are called {twice!r}; rename or remove one")


def _text(file: Path, spec: dict) -> Iterator[str]:
    # Blank lines at the ends of a file do not make it one with blank lines between documents.
    seen_text = blank_after = blank_between = False
    for line in lines(file):
        if not line.strip():
            blank_after = seen_text
        elif blank_after:
            blank_between = True
            break
        else:
            seen_text = True
    return from_lines(lines(file), blank_between)


def _jsonl(file: Path, spec: dict) -> Iterator[tuple[str, dict]]:
    for number, line in enumerate(lines(file), 1):
        if not line.strip():
            continue
        row = parse(line, f"{file}, line {number}")
        if not isinstance(row, dict):
            raise UserError(f"{file}, line {number} is not a JSON object")
        yield f"{file}, line {number}", row


def _json(file: Path, spec: dict) -> Iterator[tuple[str, dict]]:
    rows = parse("".join(lines(file)), str(file))
    if not isinstance(rows, list):
        raise UserError(f"{file} must hold a list of objects")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(f"{file}, row {number} is not a JSON object")
        yield f"{file}, row {number}", row


def _table(file: Path, spec: dict) -> Iterator[tuple[str, dict]]:
    """The rows of a .csv or .tsv, numbered from the header, which is row 1."""
    delimiter = _delimiter(spec)
    quoted = delimiter is not None or file.suffix == ".csv"
    number, blank = 0, []
    try:
        rows = _quoted(file, delimiter or ",") if quoted else _split(file)
        header, number = next(rows, []), 1
        check_header(header, f"{file}, row 1")
        if delimiter is None:
            _check_delimiter(header, file)
        for number, row in enumerate(rows, 2):
            if not row:  # a blank line, or in a table of one column perhaps an empty cell
                blank += [number] if len(header) == 1 else []
                continue
            if len(row) != len(header):
                hint = "" if quoted else _if_quoted(row)
                raise UserError(
                    f"{file}, row {number}: {len(row)} fields, the header {len(header)}{hint}"
                )
            yield from ((f"{file}, row {empty}", {header[0]: ""}) for empty in blank)
            blank = []
            yield f"{file}, row {number}", dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise UserError(f"{file}, row {number + 1}: {error}") from None


def _quoted(file: Path, delimiter: str) -> Iterator[list[str]]:
    csv.field_size_limit(2**31 - 1)
    yield from csv.reader(lines(file), delimiter=delimiter, strict=True)


def _split(file: Path) -> Iterator[list[str]]:
    told = False
    for number, line in enumerate(lines(file), 1):
        text = line.rstrip("\r\n")
        row = text.split("\t") if text else []
        if '""' in text and not told and (hint := _if_quoted(row)):
            told = True
            log.warning("%s, row %d: the quotes are read as they stand%s", file, number, hint)
        yield row


def _if_quoted(row: list[str]) -> str:
    """Advice, where a field of a .tsv looks as pandas writes it: in quotes, those inside doubled,
    or broken off at a line's end."""
    for field in row:
        inside = field[1:-1] if field.endswith('"') else field[1:]
        if field.startswith('"') and '"' not in inside.replace('""', ""):
            return "; if fields with quotes or line ends in them were quoted, set delimiter='\\t'"
    return ""


def _delimiter(spec: dict) -> str | None:
    given = spec.get("delimiter")
    given = "\t" if given == "\\t" else given  # as command lines write it
    if given is not None and (not isinstance(given, str) or len(given) != 1 or given in '"\r\n'):
        raise UserError(f"delimiter={given!r} must be one character, such as ';' or '\\t'")
    return given


def _check_delimiter(header: list[str], file: Path) -> None:
    other = next((mark for mark in ";\t|" if len(header) == 1 and mark in header[0]), None)
    if other is not None:
        raise UserError(
            f"{file}, row 1: the header is one column, {header[0]!r}; where {other!r} separates "
            f"columns, set delimiter={other!r} beside the path (--delimiter of predict), or write "
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
            if column is not None:
                _field(dict.fromkeys(names), column, str(file))
                names = [column]
            number = 0
            for batch in table.iter_batches(batch_size=1024, columns=names):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file}, row {number}", row
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is no parquet file, or a damaged one: {error}") from None


def _field(row: dict, column: str, place: str) -> str:
    if column not in row:
        raise UserError(f"{place}: no column {column!r}; set text= to one of: {', '.join(row)}")
    text = "" if row[column] is None else row[column]
    if not isinstance(text, str):
        raise UserError(f"{place}: {column!r} holds {type(text).__name__}, not text")
    return text


def _texts(records):
    return lambda file, spec: from_rows(
        _field(row, spec["text"], place) for place, row in records(file, spec)
    )


# (place, row) of every row of a file; a column that is named is the only one that is needed.
_RECORDS = {".jsonl": _jsonl, ".csv": _table, ".tsv": _table, ".parquet": _parquet}
_READERS = {".txt": _text, ".raw": _text} | {
    suffix: _texts(records) for suffix, records in _RECORDS.items()
}
_RECORDS[".json"] = _json
