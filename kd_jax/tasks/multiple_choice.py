"""Multiple choice by likelihood: every ending is scored after its context, and the likeliest one is
the model's answer."""

import functools
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from kd_jax.data import splits
from kd_jax.data.continuations import Rows, endings
from kd_jax.data.splits import Questions
from kd_jax.errors import UserError
from kd_jax.metrics import likelihood
from kd_jax.ranges import settings
from kd_jax.tasks.scoring import DATA


class MultipleChoice:
    """Subclasses read the questions."""

    by_character = False  # whether there is an accuracy by log-likelihood a character, acc_norm
    defaults: dict[str, Any]  # of config.task

    def __init__(self, config: Mapping, data: Mapping | None) -> None:
        self.config = settings(config, self.defaults, "task")
        self.seq_len = self.config["seq_len"]
        self.data = settings(data, DATA, "data")

    def _read(self) -> Questions:
        raise NotImplementedError

    @functools.cached_property
    def questions(self) -> Questions:
        return self._read()

    def manifest(self) -> dict[str, Any]:
        """See `scoring.ScoringTask`."""
        return splits.about(self.questions) | dict(examples=len(self.questions))

    def encoded(self, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> "ScoredChoices":
        """Rows of contexts and endings. UserError where no question's endings fit."""
        return ScoredChoices(self.questions, tokenizer, max_tokens, self.by_character)


class ScoredChoices:
    """See `scoring.Scored`; a stretch is an ending.

    A context that does not fit before its ending loses tokens at its beginning. A question with an
    ending that alone is longer than the model's context is left out of all figures.
    """

    def __init__(self, questions, tokenizer, max_tokens, by_character):
        stretches, owners = endings(tokenizer, questions)
        self.rows = Rows(stretches, max_tokens, owners)
        self.counts_N = stretches.counts_N
        self._questions, self._by_character = questions, by_character
        self._first_Q = np.searchsorted(owners, np.arange(len(questions) + 1))
        unfit = {owners[n] for n in np.flatnonzero(self.rows.left_out_N)}
        self._scored = [q for q in range(len(questions)) if q not in unfit]
        if not self._scored:
            raise UserError(
                f"{questions.name}: each question has an ending of more than {max_tokens} tokens, "
                f"all that the model reads at once"
            )
        self._labelled = [q for q in self._scored if questions.questions[q].answer is not None]

    @property
    def chance(self) -> float | None:
        counts = [len(self._questions.questions[q].endings) for q in self._labelled]
        return likelihood.chance(counts) if counts else None

    def hits(self, log_likelihoods_N):
        """{"acc": bool (Q,)} and, where the task normalises, "acc_norm"; of the questions that have
        a right answer and are not left out."""
        if not self._labelled:
            return {}
        questions = [self._questions.questions[q] for q in self._labelled]
        values = [self._of(q, log_likelihoods_N) for q in self._labelled]
        answers_Q = np.array([question.answer for question in questions])
        found = {"acc": likelihood.taken(values) == answers_Q}
        if self._by_character:
            values = [
                likelihood.per_character(value, question.endings)
                for value, question in zip(values, questions, strict=True)
            ]
            found["acc_norm"] = likelihood.taken(values) == answers_Q
        return found

    def figures(self, log_likelihoods_N):
        """{"acc", "acc_error" (standard, binomial), "acc_interval" (95%), the same of "acc_norm",
        "chance", "groups" (of each group its acc and so on, where there are several), "questions",
        "endings", "truncated" (endings whose context was cut), "left_out" (questions)}."""
        hits = self.hits(log_likelihoods_N)
        found = _shares(hits) | ({"chance": self.chance} if hits else {})
        groups = [self._questions.questions[q].group for q in self._labelled]
        if len(set(groups)) > 1:
            found["groups"] = {
                group: {"questions": count}
                | _shares({name: hit_Q[np.equal(groups, group)] for name, hit_Q in hits.items()})
                for group, count in Counter(groups).items()
            }
        return found | {
            "questions": len(self._scored),
            "endings": int(sum(self._first_Q[q + 1] - self._first_Q[q] for q in self._scored)),
            "truncated": int(self.rows.truncated_N.sum()),
            "left_out": len(self._questions) - len(self._scored),
        }

    def records(self, log_likelihoods_N) -> Iterator[dict[str, Any]]:
        """{"question" (its number from 0), "ending" (likewise), "text", "log_likelihood" (in nats,
        None where left out), "tokens", "answer" (whether it is the right one, None where unknown),
        "group"}."""
        for q, question in enumerate(self._questions.questions):
            for e, text in enumerate(question.endings):
                n = self._first_Q[q] + e
                value = float(log_likelihoods_N[n])
                yield {
                    "question": q,
                    "ending": e,
                    "text": text,
                    "log_likelihood": None if np.isnan(value) else value,
                    "tokens": int(self.counts_N[n]),
                    "answer": None if question.answer is None else e == question.answer,
                    "group": question.group,
                }

    def _of(self, question: int, values_N: np.ndarray) -> np.ndarray:
        return values_N[self._first_Q[question] : self._first_Q[question + 1]]


def _shares(hits: dict[str, np.ndarray]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, hits_Q in hits.items():
        share = likelihood.share(hits_Q)
        found |= {name: share["value"]} | {
            f"{name}_{key}": share[key] for key in ("error", "interval")
        }
    return found
