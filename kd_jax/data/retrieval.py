"""Reads sets for retrieval: queries, a corpus, and which documents are relevant to which query.

A set is a folder in BEIR's layout (Thakur et al. 2021, arXiv:2104.08663): corpus.jsonl (_id, text,
perhaps title), queries.jsonl (_id, text), and qrels/SPLIT.tsv (query-id, corpus-id, score), whose
path may stand for the folder's; a data set of the hub in MTEB's, with the same columns in the
configurations `corpus`, `queries` and `default`; or a .json of SQuAD, whose paragraphs are the
documents: the one that a question was asked about is relevant to it.
"""

import dataclasses
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kd_jax.data import source, squad
from kd_jax.data.source import Records, blank
from kd_jax.data.squad import field
from kd_jax.errors import UserError

SPLITS = {"validation": "dev", "test": "test"}  # by the key of config.data


@dataclasses.dataclass(frozen=True)
class Judged:
    """Queries of which some documents of a corpus are judged."""

    name: str  # for messages and the run's manifest
    queries: dict[str, str]  # id -> text; those alone of which a document is judged
    documents: dict[str, str]  # id -> text, behind its title where it has one
    grades: dict[str, dict[str, float]]  # query's id -> document's id -> grade, above 0 if relevant
    commit: str | None = None  # of a hub repository


def read(spec: dict[str, Any], where: str) -> Judged:
    """Reads the set of the source `spec`, the section config.<where>.

    A document that no line of the qrels names has grade 0 for a query. Raises UserError for a
    missing file, for an id or a judged pair that is there twice, for an unknown id, for an empty
    text, and for a grade that is no finite number; it names file and line.
    """
    spec = spec | {"split": spec["split"] or SPLITS.get(where.rpartition(".")[2])}
    if spec["source"] == "files" and str(spec["path"]).endswith(".json"):
        return _of_squad(squad.read(Path(os.path.expanduser(spec["path"]))))
    if spec["source"] == "files":
        parts = [spec | {"path": str(file)} for file in _files(spec, where)]
    else:
        parts = [*(spec | dict(name=name, split=name) for name in ("corpus", "queries")), spec]
    corpus, queries, qrels = (
        source.records(part, where, *columns) for part, columns in zip(parts, _COLUMNS, strict=True)
    )
    documents, asked = _texts(corpus), _texts(queries)
    grades = _grades(qrels, asked, documents)
    queries = {key: text for key, text in asked.items() if key in grades}
    return Judged(qrels.name, queries, documents, grades, qrels.commit)


_COLUMNS = (("_id", "title", "text"), ("_id", "text"), ("query-id", "corpus-id", "score"))


def _files(spec: dict[str, Any], where: str) -> tuple[Path, Path, Path]:
    """Finds corpus, queries and qrels of a folder in BEIR's layout."""
    path = Path(os.path.expanduser(str(spec["path"])))
    qrels = path if path.suffix == ".tsv" else path / "qrels" / f"{spec['split']}.tsv"
    folder = qrels.parent.parent
    for file in (folder / "corpus.jsonl", folder / "queries.jsonl", qrels):
        if not file.is_file():
            there = ", ".join(str(each) for each in sorted(qrels.parent.glob("*.tsv")))
            hint = (
                f"; config.{where}.path can be one of: {there}" if file == qrels and there else ""
            )
            raise UserError(
                f"{file} (config.{where}) does not exist: for retrieval a folder has corpus.jsonl, "
                f"queries.jsonl and qrels/SPLIT.tsv{hint}"
            )
    return folder / "corpus.jsonl", folder / "queries.jsonl", qrels


def _texts(records: Records) -> dict[str, str]:
    found: dict[str, str] = {}
    for place, row in records:
        key = str(field(row, "_id", place))
        text = f"{row.get('title') or ''} {field(row, 'text', place, str)}".strip()
        if blank(text):
            raise UserError(f"{place}: the text is empty; remove the row")
        if key in found:
            raise UserError(f"{place}: the _id {key!r} is there twice")
        found[key] = text
    if not found:
        raise UserError(f"{records.name} holds no texts")
    return found


def _grades(
    records: Records, queries: Iterable[str], documents: Iterable[str]
) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for place, row in records:
        query, document = (str(field(row, key, place)) for key in ("query-id", "corpus-id"))
        for key, known, what in ((query, queries, "query"), (document, documents, "document")):
            if key not in known:
                raise UserError(f"{place}: there is no {what} with the _id {key!r}")
        try:
            grade = float(field(row, "score", place))
        except (TypeError, ValueError):
            grade = math.nan
        if not math.isfinite(grade):
            raise UserError(f"{place}: the score {row['score']!r} is no finite number")
        if document in found.setdefault(query, {}):
            raise UserError(f"{place}: query {query!r} and document {document!r} are there twice")
        found[query][document] = grade
    if not found:
        raise UserError(f"{records.name} judges no documents")
    return found


def _of_squad(questions: squad.Questions) -> Judged:
    asked = [question for question in questions.questions if question.answers]
    contexts = dict.fromkeys(question.context for question in questions.questions)
    numbers = {context: f"paragraph {number}" for number, context in enumerate(contexts, 1)}
    return Judged(
        questions.name,
        {question.id: question.question for question in asked},
        {number: context for context, number in numbers.items()},
        {question.id: {numbers[question.context]: 1.0} for question in asked},
    )
