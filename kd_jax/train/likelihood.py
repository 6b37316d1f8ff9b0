"""Scores a causal language model on stretches of text: one step over all devices, and a pass over
all rows."""

import functools
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from kd_jax.evals import likelihood
from kd_jax.train import sharding
from kd_jax.train.sharding import Table, place
from kd_jax.types import Array, Batch, Model

# Steps at a time. XLA's CPU backend runs what one thread asks for one after the other, and leaves
# processors idle where a batch is small; steps know nothing of each other, so two threads ask.
_THREADS = 2


def log_likelihoods(
    model: Model, batches: Iterable[Batch], segments: int, operand: str, mesh: Mesh, table: Table
) -> dict[int, np.ndarray]:
    """Of every row of the batches, by the row's id: (K,) float32 sums of log p in nats, one a
    segment; see `evals.likelihood.of_segments`.

    All processes call this together, and all get every row.
    """
    found: dict[int, np.ndarray] = {}
    waiting: deque[Future] = deque()
    several = jax.process_count() > 1  # these have to do everything in the same order

    def sums(batch: Batch) -> tuple[np.ndarray, Array]:
        on_mesh = place(batch, mesh)
        sums_BK = likelihood_step(
            model, on_mesh, segments=segments, operand=operand, mesh=mesh, table=table
        )
        return batch.ids_B, jax.block_until_ready(sums_BK)

    def take() -> None:
        ids_B, sums_BK = waiting.popleft().result()
        if several:
            ids_B = multihost_utils.process_allgather(ids_B, tiled=True)
            sums_BK = multihost_utils.process_allgather(sums_BK, tiled=True)
        for row, sums_K in zip(ids_B, np.asarray(sums_BK), strict=True):
            if row >= 0:  # the others fill the batch up
                found[int(row)] = sums_K

    with ThreadPoolExecutor(1 if several else _THREADS) as threads:
        for batch in batches:
            waiting.append(threads.submit(sums, batch))
            if len(waiting) > (0 if several else _THREADS):
                take()
        while waiting:
            take()
    return found


@functools.partial(jax.jit, static_argnames=("segments", "operand", "mesh", "table"))
def likelihood_step(
    model: Model, batch: Batch, *, segments: int, operand: str, mesh: Mesh, table: Table
) -> Array:
    """`evals.likelihood.of_segments` of one batch, (B, K); dropout off."""
    specs = sharding.param_specs(table, model.params, mesh)

    def local(params, batch):
        output = Model(sharding.gather(params, specs), model.graphdef)(batch)
        return likelihood.of_segments(output, batch, segments, operand)

    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(specs, sharding.BATCH),
        out_specs=sharding.BATCH,
        check_vma=False,
    )(model.params, batch)
