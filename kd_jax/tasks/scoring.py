"""Tasks that a causal language model is only scored on, by the likelihood it gives to text.

A module of kd_jax.tasks is such a task when it defines
`scoring(config, data) -> ScoringTask`; config.data has one key:

    test  a source (data/source.py, and the layouts in which the task's data is shipped); where it
          is None, the hub's reported split, for tasks that have one
"""

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase

from kd_jax.data.continuations import Rows
from kd_jax.ranges import Whole

DATA = dict(test=None)
POSITIONS = Whole(least=1, default=None)  # None: all that the model has


class Scored(Protocol):
    """A task as a tokenizer writes it for models with so many positions: rows, and what becomes of
    the log-likelihoods of their stretches, float (N,) nats, NaN for those left out."""

    rows: Rows
    chance: float | None  # accuracy of guessing

    def figures(self, log_likelihoods_N: np.ndarray) -> dict[str, Any]:
        """What is reported, and of how much text."""

    def hits(self, log_likelihoods_N: np.ndarray) -> dict[str, np.ndarray]:
        """For each accuracy, which questions are answered rightly; {} where there are none."""

    def records(self, log_likelihoods_N: np.ndarray) -> Iterator[dict[str, Any]]:
        """Every stretch with its log-likelihood, for a file of JSON lines."""


class ScoringTask(Protocol):
    """A task before any tokenizer."""

    seq_len: int | None  # positions of the model that are used; None: all of them

    def manifest(self) -> dict[str, Any]:
        """What is scored: {"name", "commit", "digest", "examples"}."""

    def encoded(self, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> Scored:
        """Rows for models that have `max_tokens` positions."""
