"""Defines tasks that only evaluate causal language models, by the likelihood they give to text; in
multiple choice every ending is scored after its context, and the likeliest is the prediction.

A module of kd_jax.tasks is such a task when it defines `scoring(config, data)`, a `LikelihoodTask`;
config.data has one key:

    test  a source (data/source.py, and the task's original file layouts); None: the split on the
          hub that papers report, for tasks that have one
"""

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
from kd_jax.ranges import Whole, settings

DATA = dict(test=None)
POSITIONS = Whole(least=1, default=None)  # None: all that the model has


class Scored:
    """A likelihood task tokenized for one context length. Log-likelihoods of its stretches are
    float (N,) nats, NaN for stretches that were left out."""

    rows: Rows
    chance: float | None = None  # accuracy of guessing

    def figures(self, log_likelihoods_N: np.ndarray) -> dict[str, Any]:
        """Computes the reported metrics, and counts the text that was scored."""
        raise NotImplementedError

    def hits(self, log_likelihoods_N: np.ndarray) -> dict[str, np.ndarray]:
        """Tells which questions are answered correctly: {accuracy's name: bool (Q,)}; {} for tasks
        without questions."""
        return {}

    def records(self, log_likelihoods_N: np.ndarray) -> Iterator[dict[str, Any]]:
        """Yields every stretch with its log-likelihood, as rows of a JSON-lines file."""
        raise NotImplementedError


class LikelihoodTask:
    """A task that is scored by likelihood, not yet tokenized. Subclasses read its data."""

    defaults: dict[str, Any]  # of config.task; seq_len: positions of the model that are used
    alias, variant, variants, unread = "", "", (), {}  # as of a `Task`
    by_likelihood, of_examples = True, False
    of_text = False  # whether a source's key `text` names the column
    as_trained = False  # without a seq_len, rows are as long as in the model's training

    def __init__(self, config: Mapping, data: Mapping | None) -> None:
        self.config = settings(config, self.defaults, "task")
        self.seq_len = self.config["seq_len"]
        self.data = settings(data, DATA, "data")

    def _read(self) -> Any:
        """Reads the data to score: a `splits.Section`."""
        raise NotImplementedError

    @functools.cached_property
    def scored(self) -> Any:
        """Returns the data to score, read once: a `splits.Section`."""
        return self._read()

    def manifest(self) -> dict[str, Any]:
        """Describes the scored data: {"name", "commit", "digest", "examples"}."""
        return splits.about(self.scored) | dict(examples=len(self.scored))

    def encoded(self, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> Scored:
        """Makes rows for models that have `max_tokens` positions. Raises UserError where nothing
        fits."""
        raise NotImplementedError


class MultipleChoice(LikelihoodTask):
    """Multiple choice by likelihood. Subclasses read `Questions` of `continuations.Question`."""

    by_character = False  # whether there is an accuracy by log-likelihood a character, acc_norm

    def encoded(self, tokenizer, max_tokens):
        return ScoredChoices(self.scored, tokenizer, max_tokens, self.by_character)


class ScoredChoices(Scored):
    """A tokenized multiple-choice task; a stretch is an ending.

    A context that does not fit before its ending loses tokens at its beginning. A question with an
    ending that alone is longer than the model's context is left out of all figures.
    """

    def __init__(
        self,
        questions: Questions,
        tokenizer: PreTrainedTokenizerBase,
        max_tokens: int,
        by_character: bool,
    ):
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
        """Tells which questions are answered correctly: {"acc": bool (Q,)}, and "acc_norm" if the
        task normalizes; without questions that were left out or have no right answer."""
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
        """Computes {"acc", "acc_error" (standard, binomial), "acc_interval" (95%), same "acc_norm",
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
        """Yields {"question" (its number from 0), "ending" (likewise), "text", "log_likelihood"
        (nats, None if left out), "tokens", "answer" (whether it is the right one, None if unknown),
        "group"} of each ending."""
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
