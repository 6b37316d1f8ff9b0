"""Finds the prompts that a run's models write after, in the training text of its task.

They are what a document begins with, or what comes before the last answer of a conversation
(`beginnings` of the tasks). The stream of batches is a function of (seed, step).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
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
    """The training prompts of a stage, in the order of its batches."""

    def __init__(self, run: Run, this: Settings, length: int) -> None:
        """Finds the prompts of at most `length` tokens. Raises UserError if there are none."""
        found = beginnings(run, this, length, "train")
        self._stream = Stream(
            len(found),
            lambda ids_B, _: _rows(found, ids_B, length),
            this.batch_size,
            seed=run.config.seed,
            **run.processes,
        )

    def batch(self, step: int) -> Given:
        """Returns this process's rows of the prompts of a step."""
        return self._stream[step]


def held_out(run: Run, this: Settings, length: int, count: int, split: str) -> Given:
    """Returns this process's share of the first `count` prompts of a split, again from the first
    one on where there are fewer. Raises UserError if there are none."""
    found, each = beginnings(run, this, length, split), count // jax.process_count()
    return _rows(found, (jax.process_index() * each + np.arange(each)) % len(found), length)


def beginnings(run: Run, this: Settings, length: int, split: str) -> Beginnings:
    """Finds the prompts of a split, of at most `length` tokens. Raises UserError if there are
    none."""
    task = run.tasks[this.model]
    found = task.beginnings(split, length)
    if not len(found):
        raise UserError(
            f"{task.examples(split).name} has no prompt of at most {length} tokens, with a text "
            "after it: change prompt_tokens"
        )
    return found


def _rows(found: Beginnings, ids_B: np.ndarray, length: int) -> Given:
    return Given(*found.padded(ids_B, length), ids_B.astype(np.int32))
