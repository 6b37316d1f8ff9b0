"""Reads the texts, pairs of texts, questions or chats of `predict` and `generate`, and writes the
predictions."""

import contextlib
import csv
import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kd_jax import storage
from kd_jax.data import files, source, squad
from kd_jax.data.messages import Row, asked
from kd_jax.data.source import Table, blank
from kd_jax.data.squad import Question
from kd_jax.errors import UserError
from kd_jax.tasks.classification import Texts

TABLES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
STAND_IN = "."
_DELIMITERS = {".csv": ",", ".tsv": "\t"}  # of files that are written; others are JSON lines
LINES = ("", ".jsonl", *_DELIMITERS)  # suffixes of files of predictions


class Input(NamedTuple):
    """The texts, or questions, of an input file, in its order."""

    examples: Texts | list[Question]
    place: Callable[[int], str]  # where row i stands, for messages
    ids: list | None  # the column "id", where there is one, as JSON has it
    empty: frozenset[int]  # rows that are kept although they have no text; STAND_IN is read for it

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def first(self) -> tuple[str, ...]:
        """Returns the text, or the pair of texts, of the first row."""
        if isinstance(self.examples, Texts):
            return self.examples.pairs[0]
        return self.examples[0].question, self.examples[0].context


def texts(
    path: Path, text: str | None, pair: str | None, delimiter: str | None, keep_empty: bool
) -> Input:
    """Reads the texts of a .txt, one a line, or of the columns `text` (None: "text") and `pair`
    (None: single texts) of a table.

    Raises UserError for a file of another kind, a missing column, and, unless `keep_empty`, the
    first empty text: often the column is the wrong one or the file is broken, which is better found
    before the work than in the predictions.
    """
    _check_input(path, (".txt", *TABLES))
    if path.suffix == ".txt":
        if text or pair or delimiter:
            raise UserError(f"{path} has no columns: leave --text, --pair and --delimiter out")
        first = [line.rstrip("\r\n") for line in files.lines(path)]
        while first and not first[-1].strip():
            first.pop()
        if not first:
            raise UserError(f"{path} holds no text")
        columns, place, ids = [first], lambda row: f"{path}, line {row + 1}", None
    else:
        table = _table(path, delimiter)
        flags = {"--text": text or "text"} | ({"--pair": pair} if pair else {})
        columns = [_texts(table, name, flag, keep_empty) for flag, name in flags.items()]
        place, ids = table.place, _ids(table)
    columns, empty = _filled(columns, ("text", "text"), place, keep_empty)
    found = Texts(str(path), *(*columns, None)[:2], None, place)
    return Input(found, place, ids, empty)


def questions(path: Path, delimiter: str | None, keep_empty: bool) -> Input:
    """Reads the questions of a SQuAD .json (answers may be missing, and are not read), or of a
    table with the columns question and context.

    Raises UserError as `texts` does.
    """
    _check_input(path, TABLES)
    table = _squad(path) if path.suffix == ".json" else None
    table = table or _table(path, delimiter)
    names = ("question", "context")
    columns = [_texts(table, name, "the column names", keep_empty) for name in names]
    columns, empty = _filled(columns, names, table.place, keep_empty)
    pairs = enumerate(zip(*columns, strict=True))
    found = [Question(str(row), "", context, question, ()) for row, (question, context) in pairs]
    return Input(found, table.place, _ids(table), empty)


def prompts(
    path: Path, text: str | None, messages: str | None, delimiter: str | None
) -> tuple[Input | list[Row], Callable[[int], str], list | None]:
    """Reads prompts: (texts, as `texts`, or chats, of the column `messages`, if it is given or
    there; where prompt i stands in the file; the column "id", or None).

    Raises UserError as `texts` and `data.messages.asked` do.
    """
    if text and messages:
        raise UserError("--text and --messages: give one of them")
    _check_input(path, (".txt", *TABLES))
    table = None if path.suffix == ".txt" or text else _table(path, delimiter)
    column = messages or "messages"
    if messages is None and (table is None or column not in table.columns):
        found = texts(path, text, None, delimiter, keep_empty=False)
        return found, found.place, found.ids
    if table is None:
        raise UserError(f"{path} has no columns: leave --messages out")
    names = [name for name in (column, "tools") if name in table.columns]
    rows = zip(*(table.column(name, "--messages") for name in names or [column]), strict=True)
    placed = ((table.place(i), dict(zip(names, row, strict=True))) for i, row in enumerate(rows))
    return list(asked(placed, column, "--messages")), table.place, _ids(table)


def _table(path: Path, delimiter: str | None) -> Table:
    return source.table({"path": str(path), "delimiter": delimiter}, "input")


def _texts(table: Table, name: str, key: str, keep_empty: bool) -> list[str]:
    if keep_empty and name in table.columns:  # a missing text is an empty one
        values = ["" if value is None else value for value in table.columns[name]]
        table = dataclasses.replace(table, columns={name: values})
    return table.texts(name, key)


def _filled(
    columns: list[list[str]], names: Sequence[str], place: Callable[[int], str], keep_empty: bool
) -> tuple[list[list[str]], frozenset[int]]:
    """Replaces empty texts by STAND_IN; returns the columns, and the rows that were empty."""
    empty = frozenset(row for column in columns for row, text in enumerate(column) if blank(text))
    if empty and not keep_empty:
        row, of = min(empty), f" (one of {len(empty)})" if len(empty) > 1 else ""
        name = next(n for n, column in zip(names, columns, strict=False) if blank(column[row]))
        raise UserError(
            f"{place(row)}: the {name} is empty; remove the row{of}; predict and embed can keep it "
            f"(--keep_empty)"
        )
    return [[STAND_IN if blank(text) else text for text in each] for each in columns], empty


def _ids(table: Table) -> list | None:
    """Returns the column "id" as JSON has it: NaN is null, dates are written as in ISO 8601."""

    def plain(value: Any) -> str:
        return value.isoformat() if hasattr(value, "isoformat") else str(value)

    ids = table.columns.get("id")
    return None if ids is None else json.loads(json.dumps(storage.finite(ids), default=plain))


def _check_input(path: Path, have: tuple[str, ...]) -> None:
    if not path.is_file():
        raise UserError(f"{path}: no such file; give --input a file")
    if path.suffix not in have:
        kind = path.suffix or "files without a suffix"
        raise UserError(f"{path}: cannot read {kind} here; have: {', '.join(have)}")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty")


def _squad(path: Path) -> Table | None:
    """Reads a SQuAD .json as a table; None if the file is a list of rows."""
    content = files.read_json(path)
    if isinstance(content, list):
        return None
    return Table.of_records(str(path), _entries(content, path))


def _entries(content: Any, path: Path) -> Iterator[tuple[str, dict]]:
    for place, _, context, entry in squad.entries(content, path):
        question = squad.field(entry, "question", place, str)
        own = {"id": entry["id"]} if "id" in entry else {}
        yield place, own | {"question": question, "context": context}


def check_output(path: Path, source: Path, suffixes: Sequence[str] = LINES) -> None:
    """Raises UserError if `path` has an unknown suffix, is a folder, or is the input itself."""
    if path.suffix not in suffixes:
        have = ", ".join(filter(None, suffixes))
        raise UserError(f"--output={path}: cannot write {path.suffix}; have: {have}")
    if path.is_dir():
        raise UserError(f"--output={path} is a folder; give a file")
    if path.exists() and source.exists() and path.samefile(source):
        raise UserError(f"--output={path} is the input; give another file")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Callable[[list[dict]], None]]:
    """Opens a file for predictions, JSON lines or a table; yields a function that writes rows, all
    with the same keys.

    The file gets its name when the block ends; after an error nothing is left. In a table the
    classes of `probabilities` are columns "probability_CLASS", and None is an empty cell.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")

    def lines(rows: list[dict]) -> None:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def cells(rows: list[dict]) -> None:
        flat = [_flat(row) for row in rows]
        table = csv.writer(file, delimiter=_DELIMITERS[path.suffix], lineterminator="\n")
        if flat and not file.tell():
            table.writerow(flat[0])
        table.writerows(row.values() for row in flat)

    try:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            yield cells if path.suffix in _DELIMITERS else lines
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _flat(row: dict) -> dict:
    classes = {f"probability_{k}": v for k, v in row.get("probabilities", {}).items()}
    return {key: value for key, value in row.items() if key != "probabilities"} | classes
