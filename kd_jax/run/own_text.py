"""Measures what a model writes by itself on held-out prompts, and how a teacher finds it.

A student that is as good as its teacher on given text may still lose its way in its own: the
figures here show it, for any way of training (Agarwal et al. 2023, arXiv:2306.13649, section 1).
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np

from kd_jax.models import family
from kd_jax.models.generate import Sampling, Written
from kd_jax.objectives import measures
from kd_jax.objectives.objective import Objective
from kd_jax.run import endings
from kd_jax.run.prompts import Given, held_out
from kd_jax.run.rollout import batch_of, ends, write
from kd_jax.train.passes import evaluate
from kd_jax.train.sharding import place
from kd_jax.train.step import Program
from kd_jax.types import Batch, Model

if TYPE_CHECKING:
    from kd_jax.run.run import Run
    from kd_jax.run.stage import Stage

TERMS = {measures.KL_T1: "own_kl", measures.REVERSE_KL_T1: "own_reverse_kl"}
TERMS |= {measures.ENTROPY: "own_entropy"}


def sampling(run: Run, this: Stage) -> Sampling:
    """Reads how a stage's model writes, from config.rollout."""
    own, stop = run.config.rollout, endings.of(run, this.model, this.teachers[0])
    return Sampling(own.max_new_tokens, own.temperature, own.top_k, own.top_p, stop)


class OwnText:
    """The held-out prompts of a run, which a model continues always with the same draws."""

    def __init__(self, run: Run, this: Stage, teacher: Model) -> None:
        """Finds how prompts are continued, as config.rollout describes it."""
        self._run, self._teacher, self._sampling = run, teacher, sampling(run, this)
        own = run.config.rollout.prompt_tokens, run.config.rollout.held_out
        self._prompts = functools.cache(functools.partial(held_out, run, this, *own))  # by split
        self._decode = run.tokenizers[this.model].decode
        objective = Objective((), (), tuple(TERMS), run.policy, run.policy, run.chunk)
        self._program = Program(objective, run.mesh, family.PARTITION)
        self.samples: list[dict[str, Any]] = []  # that `figures` wrote last

    def figures(self, model: Model, split: str) -> dict[str, float]:
        """Writes completions and measures them: own_kl and own_reverse_kl, KL(teacher || model) and
        KL(model || teacher) in nats a token; own_entropy of the model, in nats; own_length, tokens
        of a completion; own_ended, the share of completions that end before `max_new_tokens`."""
        run, settings = self._run, self._run.config.rollout
        prompts = self._prompts(split)
        written = write(run.mesh, family.PARTITION, model, prompts, run.config.seed, self._sampling)
        batch = batch_of(prompts, written)
        self.samples = self._shown(prompts, written, settings.samples)
        found = evaluate(model, _Once(batch), self._teacher, self._program)
        figures = {name: found[term.name] for term, name in TERMS.items()}
        stop = np.array(self._sampling.stop, np.int32)
        lengths = ends(place(batch, run.mesh), stop)
        return figures | {f"own_{name}": float(value) for name, value in lengths.items()}

    def _shown(self, prompts: Given, written: Written, count: int) -> list[dict[str, Any]]:
        """Decodes the first completions, with their prompts."""
        found, decode = [], self._decode
        for row in range(min(count, len(prompts.lengths_B))):
            tokens = int(written.counts_B[row])
            texts = {
                "prompt": decode(prompts.tokens_BT[row, : prompts.lengths_B[row]]),
                "text": decode(written.tokens_BN[row, :tokens]),
            }
            found.append(texts | {"tokens": tokens, "ended": bool(written.ended_B[row])})
        return found


class _Once:
    """A stream of one batch."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch

    def batches(self) -> list[Batch]:
        return [self._batch]
