"""Writes completions of prompts with the model that is trained, and makes batches of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from kd_jax.data import encoded
from kd_jax.models.generate import Sampling, Written
from kd_jax.run.prompts import Given, Prompts
from kd_jax.run.sampler import write_on_mesh
from kd_jax.schedules import Schedule
from kd_jax.train import sharding
from kd_jax.train.step import Inputs
from kd_jax.types import Array, Batch, Model

if TYPE_CHECKING:
    from kd_jax.run.run import Run

log = logging.getLogger(__name__)

_WHO, _DRAWS = 1, 2  # of the random numbers of a step: who writes; what


def write(
    mesh: Mesh,
    table: sharding.Table,
    model: Model,
    prompts: Given,
    seed: int,
    sampling: Sampling,
    meanwhile: Callable[[], None] = lambda: None,
) -> Written:
    """Writes a completion of each of this process's prompts, with a model on the mesh; all
    processes call this together. `meanwhile` is called while the devices write. Returns NumPy
    arrays."""
    count = len(prompts.lengths_B)
    rows_B = jax.process_index() * count + np.arange(count)
    limits_B = np.full(count, sampling.max_new_tokens)
    given = prompts.tokens_BT, prompts.lengths_B, limits_B, rows_B
    written = write_on_mesh(mesh, table, model, *given, seed, sampling)
    meanwhile()
    return jax.tree.map(lambda x: sharding.whole(x)[rows_B], written)


def batch_of(
    prompts: Given, written: Written, unfinished: bool = True, judged: bool = False
) -> Batch:
    """Makes a batch that learns from written tokens alone, the one that ended a completion
    included.

    Args:
        prompts: the prompts, token ids (B, T).
        written: their completions, (B, N).
        unfinished: whether completions that were cut off are learned from as well.
        judged: whether the batch keeps the tokens' log-probabilities when they were written.

    Returns:
        a batch of (B, T + N - 1) tokens (NumPy): labels are shifted, as in tasks/clm.py.
    """
    (_, T), N = prompts.tokens_BT.shape, written.tokens_BN.shape[1]
    learned_B = unfinished | written.ended_B
    lengths = prompts.lengths_B, written.counts_B
    rows = (
        [encoded.continued(prompt_T[:length], text_N[:count], learned)]
        for prompt_T, text_N, length, count, learned in zip(
            prompts.tokens_BT, written.tokens_BN, *lengths, learned_B, strict=True
        )
    )
    batch = encoded.batch(prompts.ids_B, rows, T + N - 1, several=False)
    if not judged:
        return batch
    learned_BN = (np.arange(N) < written.counts_B[:, None]) & learned_B[:, None]
    logp_BT = np.zeros_like(batch.weights)
    logp_BT[batch.weights > 0] = written.logp_BN[learned_BN]
    return batch.replace(written=logp_BT)


@jax.jit
def ends(batch: Batch, stop_E: Array) -> dict[str, Array]:
    """Measures the learned text of a batch's rows, on the mesh: `length`, its mean tokens, and
    `ended`, the share of rows whose last learned token is one of `stop_E`. Rows of which nothing
    is learned do not count."""
    learned_BT = batch.weights > 0
    some_B = learned_BT.any(axis=1)
    last_B = learned_BT.shape[1] - 1 - jnp.argmax(learned_BT[:, ::-1], axis=1)
    token_B = jnp.take_along_axis(batch.labels, last_B[:, None], axis=1)
    ended_B = some_B & (token_B == stop_E[None]).any(axis=1)
    rows = jnp.maximum(some_B.sum(), 1)
    return {"length": learned_BT.sum() / rows, "ended": ended_B.sum() / rows}


class Rollout:
    """The completions that a stage's steps learn from: those of the student in a share of the
    steps, else the data's. All draws are functions of (seed, step), so that a run that was killed
    writes the same again.
    """

    def __init__(
        self,
        run: Run,
        table: sharding.Table,
        prompts: Prompts,
        sampling: Sampling,
        share: Schedule,
        of_labels: Sequence[str],
        judged: bool,
    ) -> None:
        """Stores the arguments. `share`: the share of steps by step (GKD's lambda); `of_labels`:
        the terms that learn labels, which count at the data's completions only; `judged`: see
        `batch_of`."""
        self._run, self._table, self._prompts, self._sampling = run, table, prompts, sampling
        self._share, self._of_labels, self._judged = share, of_labels, judged
        self.every = run.config.rollout.every
        self._stop = np.array(sampling.stop, np.int32)
        self._kept: tuple[int, Batch] | None = None  # when it was written, and the batch
        self._all: Batch | None = None  # the same batch with what is left out of it, if anything is
        self._ahead: dict[int, Given] = {}  # the prompts of the next time

    def __call__(
        self, step: int, student: Model, batch: Batch, inputs: Inputs
    ) -> tuple[Batch, Inputs, bool]:
        """Returns what a step learns from; see `train.loop.Writer`."""
        begin = step - step % self.every
        draw = np.random.default_rng([self._run.config.seed, begin, _WHO]).random()
        if draw >= self._share(begin):
            return batch, inputs, False
        if self._kept is None or self._kept[0] != begin:
            self._kept = begin, self._write(begin, student)
        silent = dict.fromkeys(self._of_labels, np.float32(0.0))
        inputs = inputs.replace(coefficients=inputs.coefficients | silent)
        return self._kept[1], inputs, True

    def measured(self, batch: Batch, wrote: bool) -> dict[str, Any]:
        """Computes what metrics.csv has of a batch; see `train.loop.Writer`."""
        if wrote and self._all is not None:
            batch = sharding.place(self._all, self._run.mesh)
        return {"written": float(wrote)} | ends(batch, self._stop)

    def _write(self, step: int, student: Model) -> Batch:
        seed = np.random.SeedSequence([self._run.config.seed, step, _DRAWS]).generate_state(1)[0]
        prompts = self._ahead.pop(step, None) or self._prompts.batch(step)

        def look_ahead() -> None:
            self._ahead = {step + self.every: self._prompts.batch(step + self.every)}

        given = student, prompts, int(seed), self._sampling, look_ahead
        written = write(self._run.mesh, self._table, *given)
        if self._run.config.rollout.unfinished == "learn":
            return batch_of(prompts, written, judged=self._judged)
        self._all, before = batch_of(prompts, written), self._all
        if before is None and not written.ended_B.any():
            log.warning(
                "step %d: no completion ends within config.rollout.max_new_tokens, and with "
                "unfinished='leave' nothing is learned from them",
                step,
            )
        return batch_of(prompts, written, unfinished=False, judged=self._judged)
