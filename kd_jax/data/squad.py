"""Reads SQuAD's questions (v1.1: Rajpurkar et al. 2016; v2.0: 2018) from its .json or from a table,
and cuts long contexts into windows: rows of the question and a piece of its context."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from kd_jax.data import files, splits
from kd_jax.data.encoded import Encoded, join, pad_id
from kd_jax.data.source import Table, blank
from kd_jax.errors import UserError

_AT_ONCE = 512  # questions tokenized in one call, which bounds its lists of offsets


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
class Questions(splits.Questions):
    """The questions of one split."""

    unanswerable: bool = False  # v2.0: some questions may have no answer

    @functools.cached_property
    def golds(self) -> dict[str, list[str]]:
        """Lists the texts of the answers by question id."""
        return {q.id: [answer.text for answer in q.answers] for q in self.questions}

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Lists the (question, context) pairs."""
        return [(question.question, question.context) for question in self.questions]


def read(path: Path) -> Questions:
    """Reads a SQuAD .json of v1.1 or v2.0. UserError names the file and the faulty question."""
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    found, places, unanswerable = [], [], False
    for place, title, context, entry in entries(files.read_json(path), path):
        key, question = field(entry, "id", place), field(entry, "question", place)
        answers = [
            (field(answer, "answer_start", place), field(answer, "text", place))
            for answer in field(entry, "answers", place, list)
        ]
        unanswerable |= "is_impossible" in entry
        if bool(answers) == entry.get("is_impossible", False):
            raise UserError(
                f"{place} has {len(answers)} answers, and is_impossible is "
                f"{entry.get('is_impossible', False)}"
            )
        found.append(_checked(key, title, context, question, answers, place))
        places.append(place)
    return _unique(Questions(str(path), found, places.__getitem__, unanswerable=unanswerable))


def entries(content: Any, path: Path) -> Iterator[tuple[str, str, str, dict]]:
    """Reads (place, article's title, context, entry of `qas`) of each question of SQuAD's JSON.
    UserError names an article or paragraph of another layout; the entries are not checked."""
    number = 0
    for article in field(content, "data", str(path), list):
        title = article.get("title", "") if isinstance(article, dict) else ""
        for paragraph in field(article, "paragraphs", f"{path}, article {title!r}", list):
            number += 1
            place = f"{path}, paragraph {number}"
            context = field(paragraph, "context", place, str)
            for entry in field(paragraph, "qas", place, list):
                named = isinstance(entry, dict) and "id" in entry
                here = f"{path}, question {entry['id']!r}" if named else place
                yield here, title, context, entry


def of_table(table: Table) -> Questions:
    """Reads questions from rows in the hub's layout: id, title, context, question, answers (a dict
    of the lists `text` and `answer_start`). The split counts as v2.0 if a question has no answer.
    """
    names = ("id", "title", "context", "question", "answers")
    columns = [table.column(name, "config.data to SQuAD, not") for name in names]
    found = []
    for row, (key, title, context, question, answers) in enumerate(zip(*columns, strict=True)):
        place = table.place(row)
        starts, texts = (field(answers, key, place) for key in ("answer_start", "text"))
        if len(starts) != len(texts):
            raise UserError(f"{place}: {len(starts)} answer_start, but {len(texts)} text")
        pairs = list(zip(starts, texts, strict=True))
        found.append(_checked(key, title, context, question, pairs, place))
    unanswerable = any(not question.answers for question in found)
    return _unique(Questions(table.name, found, table.place, table.commit, unanswerable))


def field(mapping: Any, key: str, place: str, kind: type = object) -> Any:
    """Returns the value of an object's key. UserError lists the object's keys, where this one is
    missing or its value is not of the type `kind`."""
    if not (isinstance(mapping, dict) and key in mapping and isinstance(mapping[key], kind)):
        have = ", ".join(map(str, mapping)) if isinstance(mapping, dict) else "no JSON object"
        what = {list: "; it must be a list", str: "; it must be text"}.get(kind, "")
        raise UserError(f"{place} has no {key!r}; have: {have}{what}")
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


def _unique(questions: Questions) -> Questions:
    if not len(questions):
        raise UserError(f"{questions.name} holds no questions")
    seen: set[str] = set()
    for row, question in enumerate(questions.questions):
        if question.id in seen:
            place = questions.place(row)
            raise UserError(f"{place}: the question id {question.id!r} is there twice")
        seen.add(question.id)
    return questions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Windows(Encoded):
    """Rows of a question and a piece of its context. Row i's tokens [first, first + count) are the
    context's; offsets_F2 has the characters [begin, end) of the context that a token stands for.
    """

    question_N: np.ndarray  # index of the question
    first_N: np.ndarray
    count_N: np.ndarray
    offsets_F2: np.ndarray  # int32, flat like the rows' tokens

    def offsets(self, row: int) -> np.ndarray:
        """Returns the characters [begin, end) of each context token of a row, (count, 2)."""
        start = self.starts_N[row] + self.first_N[row]
        return self.offsets_F2[start : start + self.count_N[row]]


def windows(
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    seq_len: int,
    doc_stride: int,
    max_question: int,
    place: Callable[[int], str] = "question {}".format,
) -> Windows:
    """Tokenizes questions and contexts into windows of at most `seq_len` tokens.

    Neighboring windows of a question share `doc_stride` tokens of its context; questions are cut to
    `max_question` tokens. Labels are the first and last token of the first answer, or 0 and 0, the
    [CLS], where the window does not hold all of it. `place(i)` tells where a question stands, for
    messages. Raises UserError where question and overlap fill a row, and for a context that has
    no tokens.
    """
    special = tokenizer.num_special_tokens_to_add(pair=True)
    least = special + max_question + doc_stride + 1
    if seq_len < least:
        raise UserError(
            f"config.task.seq_len={seq_len} must be at least {least}: max_question_length + "
            f"doc_stride + {special} special tokens + 1"
        )
    tokens, types, offsets, places, labels = [], [], [], [], []
    cut = 0  # questions
    for start in range(0, len(questions), _AT_ONCE):
        part = questions[start : start + _AT_ONCE]
        asked = _cut(tokenizer, [question.question.strip() for question in part], max_question)
        cut += sum(text != q.question.strip() for text, q in zip(asked, part, strict=True))
        found = tokenizer(
            asked,
            [question.context for question in part],
            truncation="only_second",
            max_length=seq_len,
            stride=doc_stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            return_attention_mask=False,
        )
        tokens += [np.array(row, np.int32) for row in found["input_ids"]]
        types += [np.array(row, np.int8) for row in found.get("token_type_ids", [])]
        for row, index in enumerate(found["overflow_to_sample_mapping"]):
            sequences = found.sequence_ids(row)
            if 1 not in sequences:
                raise UserError(
                    f"{place(start + index)}: the tokenizer makes no token of the context "
                    f"{part[index].context!r:.60}; remove the row"
                )
            first, count = sequences.index(1), sequences.count(1)
            offsets_T2 = np.array(found["offset_mapping"][row], np.int32)
            answers = part[index].answers
            offsets.append(offsets_T2)
            places.append((start + index, first, count))
            labels.append(_label(offsets_T2[first : first + count], first, answers))
    question_N, first_N, count_N = np.array(places).T
    _, first_Q, windows_Q = np.unique(question_N, return_index=True, return_counts=True)
    context_Q = np.bincount(question_N, count_N) - doc_stride * (windows_Q - 1)
    around_Q = np.array([len(tokens[row]) for row in first_Q]) - count_N[first_Q]
    return join(
        tokens,
        types or None,
        np.array(labels, np.int32),
        pad_id(tokenizer),
        Windows,
        cut=cut,
        longest=int((context_Q + around_Q).max()),
        question_N=question_N,
        first_N=first_N,
        count_N=count_N,
        offsets_F2=np.concatenate(offsets),
    )


def _cut(tokenizer, texts, most):
    offsets = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    return [
        text if len(places) <= most else text[: places[most - 1][1]]
        for text, places in zip(texts, offsets["offset_mapping"], strict=True)
    ]


def _label(offsets_T2: np.ndarray, first: int, answers: Sequence[Answer]) -> tuple[int, int]:
    if not answers:
        return 0, 0
    begin, end = answers[0].start, answers[0].start + len(answers[0].text)
    if begin < offsets_T2[0, 0] or end > offsets_T2[-1, 1]:
        return 0, 0
    start = np.searchsorted(offsets_T2[:, 1], begin, side="right")
    last = np.searchsorted(offsets_T2[:, 0], end, side="left") - 1
    return (first + start, first + last) if start <= last else (0, 0)
