"""Finds the prompts that a run's models write after, in the training text of its task.

They are what a document begins with, or what comes before the last answer of a conversation
(`beginnings` of the tasks). The stream of batches is a function of (seed, step).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kd_jax.data.encoded import Beginnings
from kd_jax.data.loader import Stream
from kd_jax.errors import UserError
from kd_jax.run.run import Run
from kd_jax.run.stage import Settings


class Given(NamedTuple):
    """Prompts of one step, int32."""

    tokens_BT: np.ndarray
    lengths_B: np.ndarray
    ids_B: np.ndarray  # their numbers in the text


class Prompts:
    """The prompts of a stage, padded to `length` tokens."""

    def __init__(self, run: Run, this: Settings, length: int) -> None:
        """Finds the prompts of at most `length` tokens. Raises UserError if there are none."""
        self.length, self._task = length, run.tasks[this.model]
        self._processes = run.processes
        self.train = self._of("train")
        self._stream = Stream(
            len(self.train),
            lambda ids_B, _: self._rows(self.train, ids_B),
            this.batch_size,
            seed=run.config.seed,
            **self._processes,
        )

    def batch(self, step: int) -> Given:
        """Returns this process's rows of the prompts of a step."""
        return self._stream[step]

    def held_out(self, count: int, split: str = "validation") -> Given:
        """Returns this process's share of the first `count` prompts of a split, again from the
        first one on where there are fewer."""
        index, processes = self._processes["process_index"], self._processes["process_count"]
        found, each = self._of(split), count // processes
        return self._rows(found, (index * each + np.arange(each)) % len(found))

    def _of(self, split: str) -> Beginnings:
        found = self._task.beginnings(split, self.length)
        if not len(found):
            raise UserError(
                f"{self._task.examples(split).name} has no prompt of at most {self.length} tokens, "
                "with a text after it: change prompt_tokens"
            )
        return found

    def _rows(self, found: Beginnings, ids_B: np.ndarray) -> Given:
        return Given(*found.padded(ids_B, self.length), ids_B.astype(np.int32))
