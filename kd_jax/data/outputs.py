"""Files of predictions: .jsonl (also without a suffix), .csv and .tsv with a header."""

from __future__ import annotations

import contextlib
import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from kd_jax.errors import UserError

_DELIMITERS = {".csv": ",", ".tsv": "\t"}


def check(path: Path, source: Path) -> None:
    """Raises UserError where `path` is of no format there is, a folder, or the input itself."""
    if path.suffix not in ("", ".jsonl", *_DELIMITERS):
        have = ", ".join((".jsonl", *_DELIMITERS))
        raise UserError(f"--output={path}: cannot write {path.suffix}; have: {have}")
    if path.is_dir():
        raise UserError(f"--output={path} is a folder; give a file")
    if path.exists() and source.exists() and path.samefile(source):
        raise UserError(f"--output={path} is the input; give another file")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Callable[[list[dict]], None]]:
    """A function that writes rows, all with the same keys.

    The file is written beside its place and renamed when the block ends; after an error nothing is
    left. In a table the classes of `probabilities` are columns "probability_CLASS", None is empty.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            yield _rows(file, path.suffix)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _rows(file, suffix: str) -> Callable[[list[dict]], None]:
    if suffix not in _DELIMITERS:

        def write(rows: list[dict]) -> None:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")

        return write

    table = csv.writer(file, delimiter=_DELIMITERS[suffix], lineterminator="\n")

    def write(rows: list[dict]) -> None:
        flat = [_flat(row) for row in rows]
        if flat and not file.tell():
            table.writerow(flat[0])
        table.writerows(row.values() for row in flat)

    return write


def _flat(row: dict) -> dict:
    classes = {f"probability_{k}": v for k, v in row.get("probabilities", {}).items()}
    return {key: value for key, value in row.items() if key != "probabilities"} | classes
