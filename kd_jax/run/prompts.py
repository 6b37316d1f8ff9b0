"""TEMP"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Given(NamedTuple):
    tokens_BT: np.ndarray
    lengths_B: np.ndarray
    ids_B: np.ndarray


class Prompts:
    def __init__(self, run, batch_size, length):
        self.run, self.batch_size, self.length = run, batch_size, length
        self.tokenizer = run.tokenizers["teacher"]

    def _of(self, split):
        t = np.asarray(self.run.task._tokens(split))
        sep = self.run.task.end_of_text
        starts = np.flatnonzero(t[: -self.length] == sep)
        return t, starts

    def _take(self, split, which):
        t, starts = self._of(split)
        ids = starts[which % len(starts)]
        toks = t[ids[:, None] + np.arange(self.length)].astype(np.int32)
        return Given(toks, np.full(len(ids), self.length, np.int32), ids.astype(np.int32))

    def batch(self, step):
        rng = np.random.default_rng([self.run.config.seed, step, 77])
        return self._take("train", rng.integers(0, 10**6, self.batch_size))

    def held_out(self, split, n):
        return self._take(split, np.arange(n))
