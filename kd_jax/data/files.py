"""Local files: .txt and .raw (text), .jsonl, .csv, .tsv (with a header line), .parquet, .json."""

import csv
import glob
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from kd_jax.data.documents import Documents, from_lines, from_rows
from kd_jax.data.table import Table
from kd_jax.errors import UserError


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
            for text in _READERS[file.suffix](file, spec["text"]):
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
    records = (record for file in files for record in _RECORDS[file.suffix](file, None))
    return Table.of_records(", ".join(map(str, paths)), records)


def _find(path: str, where: str, readers: Mapping) -> list[Path]:
    expanded = os.path.expanduser(path)
    kinds = ", ".join(readers)
    if os.path.isdir(expanded):
        files = [file for file in Path(expanded).rglob("*") if file.suffix in readers]
        if not files:
            raise UserError(f"config.{where}.path={path!r}: no file of this folder is {kinds}")
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


def lines(file: Path) -> Iterator[str]:
    """Lines with their ends; UserError names the first byte that is not UTF-8."""
    start = 0
    with file.open("rb") as stream:
        for number, line in enumerate(stream, 1):
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


def _text(file: Path, column: str) -> Iterator[str]:
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


def _jsonl(file: Path, column: str | None) -> Iterator[tuple[str, dict]]:
    for number, line in enumerate(lines(file), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{file}, line {number} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise UserError(f"{file}, line {number} is not a JSON object")
        yield f"{file}, line {number}", row


def _json(file: Path, column: str | None) -> Iterator[tuple[str, dict]]:
    try:
        rows = json.loads("".join(lines(file)))
    except ValueError as error:
        raise UserError(f"{file} is not JSON: {error}") from None
    if not isinstance(rows, list):
        raise UserError(f"{file} must hold a list of objects")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(f"{file}, row {number} is not a JSON object")
        yield f"{file}, row {number}", row


def _csv(file: Path, column: str | None) -> Iterator[tuple[str, dict]]:
    csv.field_size_limit(2**31 - 1)
    return _table(csv.reader(lines(file), strict=True), file)


def _tsv(file: Path, column: str | None) -> Iterator[tuple[str, dict]]:
    return _table((line.rstrip("\r\n").split("\t") for line in lines(file)), file)


def _table(rows: Iterable[list[str]], file: Path) -> Iterator[tuple[str, dict]]:
    rows = iter(rows)
    header = next(rows, [])
    number = 1
    try:
        for number, row in enumerate(rows, 2):
            if not any(row):  # a blank line
                continue
            if len(row) != len(header):
                raise UserError(
                    f"{file}, row {number}: {len(row)} fields, the header {len(header)}"
                )
            yield f"{file}, row {number}", dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise UserError(f"{file}, after row {number}: {error}") from None


def _parquet(file: Path, column: str | None) -> Iterator[tuple[str, dict]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            if column is not None:
                _field(dict.fromkeys(names), column, str(file))
                names = [column]
            number = 0
            for batch in table.iter_batches(batch_size=1024, columns=names):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file}, row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file} is no parquet file, or a damaged one: {error}") from None


def _field(row: dict, column: str, place: str) -> str:
    if column not in row:
        raise UserError(f"{place}: no column {column!r}; set text= to one of: {', '.join(row)}")
    text = "" if row[column] is None else row[column]
    if not isinstance(text, str):
        raise UserError(f"{place}: {column!r} holds {type(text).__name__}, not text")
    return text


def _texts(records):
    return lambda file, column: from_rows(
        _field(row, column, place) for place, row in records(file, column)
    )


# (place, row) of every row of a file; a column that is named is the only one that is needed.
_RECORDS = {".jsonl": _jsonl, ".csv": _csv, ".tsv": _tsv, ".parquet": _parquet}
_READERS = {".txt": _text, ".raw": _text} | {
    suffix: _texts(records) for suffix, records in _RECORDS.items()
}
_RECORDS[".json"] = _json
