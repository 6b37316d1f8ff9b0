"""What is to be labelled: the texts, pairs of texts or questions of one file, without labels."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from kd_jax.data import files
from kd_jax.data.squad import Question
from kd_jax.data.table import Table
from kd_jax.errors import UserError
from kd_jax.tasks.classification import Texts

TABLES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")


class Input(NamedTuple):
    """Texts, or questions, in the order of their file."""

    examples: Texts | list[Question]
    ids: list | None  # the column "id", where there is one

    def __len__(self) -> int:
        return len(self.examples)


def texts(path: Path, text: str | None, pair: str | None) -> Input:
    """The texts of a .txt, one a line, or of the columns `text` (None: "text") and `pair` (None:
    single texts) of a table.

    Raises UserError for a file of another kind, a missing column, and the first empty text.
    """
    _check(path, (".txt", *TABLES))
    if path.suffix == ".txt":
        if text or pair:
            raise UserError(f"{path} has no columns: leave --text and --pair out")
        first = [line.rstrip("\r\n") for line in files.lines(path)]
        while first and not first[-1].strip():
            first.pop()
        found = Texts(str(path), first, None, None, lambda row: f"{path}, line {row + 1}")
        if not first:
            raise UserError(f"{path} holds no text")
        return Input(found.checked(), None)
    table = files.rows({"path": str(path)}, "input")
    first = table.texts(text or "text", "--text")
    second = None if pair is None else table.texts(pair, "--pair")
    found = Texts(str(path), first, second, None, table.place)
    return Input(found.checked(), table.columns.get("id"))


def questions(path: Path) -> Input:
    """The questions of a SQuAD .json (answers may be missing, and are not read), or of a table
    with the columns question and context.

    Raises UserError as `texts` does.
    """
    _check(path, TABLES)
    table = _squad(path) if path.suffix == ".json" else None
    table = table or files.rows({"path": str(path)}, "input")
    columns = [table.texts(name, "the column names") for name in ("question", "context")]
    found = []
    for row, (question, context) in enumerate(zip(*columns, strict=True)):
        for name, value in (("question", question), ("context", context)):
            if not value.strip():
                raise UserError(f"{table.place(row)}: the {name} is empty; remove the row")
        found.append(Question(str(row), "", context, question, ()))
    return Input(found, table.columns.get("id"))


def _check(path: Path, have: tuple[str, ...]) -> None:
    if not path.is_file():
        raise UserError(f"{path}: no such file; give --input a file")
    if path.suffix not in have:
        kind = path.suffix or "files without a suffix"
        raise UserError(f"{path}: cannot read {kind} here; have: {', '.join(have)}")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty")


def _squad(path: Path) -> Table | None:
    """The table of a SQuAD file; None where the file is a list of rows."""
    try:
        content = json.loads("".join(files.lines(path)))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if isinstance(content, list):
        return None
    return Table.of_records(str(path), _entries(content, path))


def _entries(content: Any, path: Path) -> Iterator[tuple[str, dict]]:
    number = 0
    for article in _field(content, "data", list, str(path)):
        for paragraph in _field(article, "paragraphs", list, f"{path}, an article"):
            number += 1
            place = f"{path}, paragraph {number}"
            context = _field(paragraph, "context", str, place)
            for entry in _field(paragraph, "qas", list, place):
                question = _field(entry, "question", str, place)
                here = f"{path}, question {entry['id']!r}" if "id" in entry else place
                own = {"id": entry["id"]} if "id" in entry else {}
                yield here, own | {"question": question, "context": context}


def _field(mapping: Any, key: str, kind: type, place: str) -> Any:
    if not isinstance(mapping, dict) or not isinstance(mapping.get(key), kind):
        have = ", ".join(map(str, mapping)) if isinstance(mapping, dict) else "no JSON object"
        what = {list: "a list", str: "text"}[kind]
        raise UserError(f"{place} has no {key!r}, which must be {what}; have: {have}")
    return mapping[key]
