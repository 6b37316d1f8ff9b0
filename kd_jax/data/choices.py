"""Multiple choice by likelihood: a context and several ways to go on, one of which is right."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterable
from typing import NamedTuple

from kd_jax.errors import UserError


class Question(NamedTuple):
    context: str
    endings: tuple[str, ...]  # each follows the context after a space
    answer: int | None  # index of the right ending; None where a test set keeps it secret
    group: str = ""  # questions of one kind, whose figures are given apart


@dataclasses.dataclass(frozen=True)
class Questions:
    """The questions of one split."""

    name: str  # for messages and the run's manifest
    questions: list[Question]
    place: Callable[[int], str]  # where a question stands, for messages: "val.jsonl, row 7"
    commit: str | None = None  # of a hub repository

    def __len__(self) -> int:
        return len(self.questions)

    @functools.cached_property
    def digest(self) -> str:
        """A hash of all texts and answers."""
        digest = hashlib.blake2b(digest_size=16)
        for question in self.questions:
            digest.update(json.dumps(question).encode())
        return digest.hexdigest()


def questions(
    name: str, found: Iterable[tuple[str, Question]], commit: str | None = None
) -> Questions:
    """Questions from (place, question) pairs. Raises UserError where there are none, for a question
    with fewer than two endings, and for an answer that is none of them."""
    places, kept = [], []
    for place, question in found:
        count = len(question.endings)
        if count < 2:
            raise UserError(f"{place}: {count} endings, there must be two or more to choose from")
        if question.answer is not None and not 0 <= question.answer < count:
            raise UserError(
                f"{place}: the label is {question.answer}; with {count} endings it must be one of "
                f"0 to {count - 1}"
            )
        places.append(place)
        kept.append(question)
    if not kept:
        raise UserError(f"{name} holds no questions")
    return Questions(name, kept, places.__getitem__, commit)


def together(parts: list[Questions]) -> Questions:
    """Several splits as one, in their order."""
    if len(parts) == 1:
        return parts[0]
    places = [part.place(row) for part in parts for row in range(len(part))]
    everything = [question for part in parts for question in part.questions]
    name = ", ".join(part.name for part in parts)
    return Questions(name, everything, places.__getitem__, parts[0].commit)
