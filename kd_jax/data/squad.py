"""SQuAD's questions (v1.1: Rajpurkar et al. 2016; v2.0: 2018), from its .json or from a table."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kd_jax.data import files
from kd_jax.data.table import Table, blank
from kd_jax.errors import UserError


class Answer(NamedTuple):
    start: int  # its first character in the context
    text: str


class Question(NamedTuple):
    id: str
    title: str  # of the article
    context: str
    question: str
    answers: tuple[Answer, ...]  # all that annotators gave; none where there is no answer


@dataclasses.dataclass(frozen=True)
class Questions:
    """The questions of one split."""

    name: str
    questions: list[Question]
    unanswerable: bool  # v2.0: some questions may have no answer
    commit: str | None = None  # of a hub repository

    def __len__(self) -> int:
        return len(self.questions)

    @functools.cached_property
    def digest(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for question in self.questions:
            digest.update(json.dumps(question).encode())
        return digest.hexdigest()

    @functools.cached_property
    def golds(self) -> dict[str, list[str]]:
        """Texts of the answers by question id."""
        return {q.id: [answer.text for answer in q.answers] for q in self.questions}

    def place(self, row: int) -> str:
        """Where a question stands, for messages."""
        return f"{self.name}, question {self.questions[row].id!r}"

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """(question, context) of each."""
        return [(question.question, question.context) for question in self.questions]

    def part(self, chosen_N: Sequence[bool] | np.ndarray, name: str) -> "Questions":
        rows = np.flatnonzero(chosen_N).tolist()
        chosen = [self.questions[row] for row in rows]
        return Questions(name, chosen, self.unanswerable, self.commit)


def read(path: Path) -> Questions:
    """A .json of v1.1 or v2.0. UserError names file and question for whatever is wrong with it."""
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    content = files.parse("".join(files.lines(path)), str(path))
    found, unanswerable, number = [], False, 0
    for article in _get(content, "data", str(path)):
        title = article.get("title", "") if isinstance(article, dict) else ""
        for paragraph in _get(article, "paragraphs", f"{path}, article {title!r}"):
            number += 1
            place = f"{path}, paragraph {number}"
            context = _get(paragraph, "context", place)
            for entry in _get(paragraph, "qas", place):
                key = _get(entry, "id", place)
                place_of = f"{path}, question {key!r}"
                answers = [
                    (_get(answer, "answer_start", place_of), _get(answer, "text", place_of))
                    for answer in _get(entry, "answers", place_of)
                ]
                unanswerable |= "is_impossible" in entry
                if bool(answers) == entry.get("is_impossible", False):
                    raise UserError(
                        f"{place_of} has {len(answers)} answers, and is_impossible is "
                        f"{entry.get('is_impossible', False)}"
                    )
                text = _get(entry, "question", place_of)
                found.append(_checked(key, title, context, text, answers, place_of))
    return _unique(Questions(str(path), found, unanswerable), lambda row: str(path))


def of_table(table: Table) -> Questions:
    """Rows in the hub's layout: id, title, context, question, answers (a dict of the lists `text`
    and `answer_start`). The split is of v2.0 where a question has no answer."""
    names = ("id", "title", "context", "question", "answers")
    columns = [table.column(name, "config.data to SQuAD, not") for name in names]
    found = []
    for row, (key, title, context, question, answers) in enumerate(zip(*columns, strict=True)):
        place = table.place(row)
        starts, texts = _get(answers, "answer_start", place), _get(answers, "text", place)
        if len(starts) != len(texts):
            raise UserError(f"{place}: {len(starts)} answer_start, but {len(texts)} text")
        pairs = list(zip(starts, texts, strict=True))
        found.append(_checked(key, title, context, question, pairs, place))
    unanswerable = any(not question.answers for question in found)
    return _unique(Questions(table.name, found, unanswerable, table.commit), table.place)


def _get(mapping: Any, key: str, place: str) -> Any:
    if not isinstance(mapping, dict) or key not in mapping:
        have = ", ".join(map(str, mapping)) if isinstance(mapping, dict) else "no JSON object"
        raise UserError(f"{place} has no {key!r}; have: {have}")
    return mapping[key]


def _checked(key, title, context, question, answers, place) -> Question:
    for name, text in (("id", key), ("context", context), ("question", question)):
        if not isinstance(text, str) or blank(text):
            raise UserError(f"{place}: the {name} is {text!r}, there must be text")
    for start, text in answers:
        inside = isinstance(start, int) and isinstance(text, str) and start >= 0
        if not inside or not text.strip() or context[start : start + len(text)] != text:
            raise UserError(
                f"{place}: the answer {text!r} does not stand at character {start!r} of its context"
            )
    return Question(key, title, context, question, tuple(Answer(*answer) for answer in answers))


def _unique(questions: Questions, place: Callable[[int], str]) -> Questions:
    if not len(questions):
        raise UserError(f"{questions.name} holds no questions")
    seen: set[str] = set()
    for row, question in enumerate(questions.questions):
        if question.id in seen:
            raise UserError(f"{place(row)}: the question id {question.id!r} is there twice")
        seen.add(question.id)
    return questions
