"""Reads the scored sets by which embedders are selected and reported, and computes their figures.

sts        rows of two texts and a score of how alike they are: Spearman's and Pearson's
           correlation of the cosine with it
retrieval  queries, a corpus and judgements (data/retrieval.py): nDCG@10, MRR@10, recall
reranking  rows of `query`, and of `positive` and `negative`, lists of texts: MAP, MRR@10. Rows
           in which one list is empty are left out, since nothing can be ordered there
"""

import dataclasses
import functools
import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from kd_jax.data import retrieval, source
from kd_jax.data.source import Table, blank
from kd_jax.errors import UserError
from kd_jax.metrics import embedding
from kd_jax.tasks.classification import numbers

log = logging.getLogger(__name__)

Figures = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Collection:
    """Texts, every one once, and what is known about them: arrays of their numbers and others. The
    first of these has as many entries as there are examples."""

    name: str
    texts: list[str]
    known: Any  # a named tuple of arrays
    commit: str | None = None

    def __len__(self) -> int:
        return len(self.known[0])

    @property
    def pairs(self) -> list[tuple[str]]:
        """Lists what a model reads at once: single texts."""
        return [(text,) for text in self.texts]

    @functools.cached_property
    def digest(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for part in (*map(str.encode, self.texts), *(array.tobytes() for array in self.known)):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
        return digest.hexdigest()


def once(*columns: Iterable[str]) -> tuple[list[str], list[np.ndarray]]:
    """Finds the different texts of some columns, and the number of each text in the columns."""
    rows: dict[str, int] = {}
    found = [
        np.array([rows.setdefault(t, len(rows)) for t in texts], np.int64) for texts in columns
    ]
    return [*rows], found


def texts(table: Table, column: str, key: str, prompt: str) -> list[str]:
    """Reads a column of texts, each behind a prompt. UserError names the first row without one."""
    found = table.texts(column, key)
    for row, text in enumerate(found):
        if blank(text):
            raise UserError(f"{table.place(row)}: {column!r} is empty; remove the row")
    return [prompt + text for text in found]


class Sts(NamedTuple):
    """Pairs of texts with scores."""

    first_N: np.ndarray
    second_N: np.ndarray
    scores_N: np.ndarray

    def figures(self, vectors_ND: np.ndarray) -> Figures:
        first_ND, second_ND = vectors_ND[self.first_N], vectors_ND[self.second_N]
        return embedding.similarity(first_ND, second_ND, self.scores_N)


class Retrieval(NamedTuple):
    """Queries, documents, and graded pairs of both."""

    query_Q: np.ndarray
    document_N: np.ndarray
    same_Q: np.ndarray  # the document with the query's id; -1 for none
    asked_P: np.ndarray  # of each pair: the number of the query,
    judged_P: np.ndarray  # of the document,
    grade_P: np.ndarray  # and its grade

    def figures(self, vectors_ND: np.ndarray) -> Figures:
        grades: list[dict[int, float]] = [{} for _ in self.query_Q]
        for query, document, grade in zip(*(array.tolist() for array in self[3:]), strict=True):
            grades[query][document] = grade
        queries_QD, documents_ND = vectors_ND[self.query_Q], vectors_ND[self.document_N]
        return embedding.retrieval(queries_QD, documents_ND, grades, self.same_Q)


class Reranking(NamedTuple):
    """Queries with documents of their own, which are relevant or not."""

    query_N: np.ndarray
    document_N: np.ndarray
    grade_N: np.ndarray  # 1 or 0
    number_N: np.ndarray  # of the query, from 0

    def figures(self, vectors_ND: np.ndarray) -> Figures:
        scores_N = embedding.cosines(vectors_ND[self.query_N], vectors_ND[self.document_N])
        return embedding.reranking(scores_N, self.grade_N, self.number_N)


def _sts(spec: dict, where: str, config: Mapping) -> Collection:
    found = source.table(spec, where)
    first, second = (
        texts(found, config[key], f"config.task.{key}", config["query_prompt"])
        for key in ("text", "pair")
    )
    values = found.column(config["label"], "config.task.label")
    rows, columns = once(first, second)
    return Collection(found.name, rows, Sts(*columns, numbers(values, found.place)), found.commit)


def _retrieval(spec: dict, where: str, config: Mapping) -> Collection:
    found = retrieval.read(spec, where)
    queries, documents = (
        [config[f"{of}_prompt"] + text for text in each.values()]
        for of, each in (("query", found.queries), ("document", found.documents))
    )
    rows, columns = once(queries, documents)
    number = {key: number for number, key in enumerate(found.documents)}
    pairs = [
        (query, number[document], grade)
        for query, key in enumerate(found.queries)
        for document, grade in found.grades[key].items()
    ]
    asked, judged, grades = zip(*pairs, strict=True)
    known = Retrieval(
        *columns,
        np.array([number.get(key, -1) for key in found.queries]),
        np.array(asked),
        np.array(judged),
        np.array(grades, np.float64),
    )
    return Collection(found.name, rows, known, found.commit)


def reranked(table: Table, config: Mapping) -> tuple[list[str], list[str], list[int], list[int]]:
    """Reads the pairs of a query and one of its documents: (query's text, document's text, whether
    the document is relevant, the query's number)."""
    key = "config.data to a table of query, positive and negative, not"
    queries = texts(table, "query", key, config["query_prompt"])
    lists = [table.lists(name, key) for name in ("positive", "negative")]
    found, left_out = [], 0
    for row, (query, positive, negative) in enumerate(zip(queries, *lists, strict=True)):
        if any(blank(text) for text in (*positive, *negative)):
            raise UserError(f"{table.place(row)}: a document is empty; remove it from its list")
        if not (positive and negative):
            left_out += 1
            continue
        documents = [(text, 1) for text in positive] + [(text, 0) for text in negative]
        found += [(query, config["document_prompt"] + text, y, row) for text, y in documents]
    if not found:
        raise UserError(f"{table.name} holds no row with both positive and negative documents")
    if left_out:
        log.warning("%s: %d rows without positive or negative are left out", table.name, left_out)
    return tuple(map(list, zip(*found, strict=True)))


def _reranking(spec: dict, where: str, config: Mapping) -> Collection:
    table = source.table(spec, where)
    queries, documents, grades, query = reranked(table, config)
    rows, columns = once(queries, documents)
    known = Reranking(*columns, np.array(grades), np.array(query))
    return Collection(table.name, rows, known, table.commit)


class Kind(NamedTuple):
    """A kind of scored sets."""

    read: Callable[[dict, str, Mapping], Collection]  # of a source, its place and config.task
    figures: tuple[str, ...]  # the first one selects
    unread: tuple[str, ...]  # settings of config.task that it does not read


KINDS = {
    "sts": Kind(_sts, embedding.SIMILARITY, ("document_prompt",)),
    "retrieval": Kind(_retrieval, embedding.RETRIEVAL, ("text", "pair", "label")),
    "reranking": Kind(_reranking, embedding.RERANKING, ("text", "pair", "label")),
}
