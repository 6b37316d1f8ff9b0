"""Held-out figures: every batch of a stream through the eval step, sums divided once; and the
answers themselves, for tasks whose figures are no sums.

A batch's results are read when the next batch is already under way, so devices never wait.
"""

from collections.abc import Iterable, Iterator
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from kd_jax.train.sharding import Table, place
from kd_jax.train.step import Plan, Teacher, eval_step, predict_step
from kd_jax.types import Model

T = TypeVar("T")


def one_behind(results: Iterable[T]) -> Iterator[T]:
    """The same results, each handed out when the next one has been asked for."""
    pending: list[T] = []
    for result in results:
        yield from pending
        pending = [result]
    yield from pending


def evaluate(
    student: Model, stream, teacher: Teacher | None, plan: Plan, by: str = "token"
) -> dict[str, float]:
    """Mean of each term of `plan.objective` over the stream's supervised rows, in float64; `by`
    batch: over the means of batches, each of the same weight."""
    totals: dict[str, np.ndarray] = {}
    batches = (place(batch, plan.mesh) for batch in stream.batches())
    for ratios in one_behind(eval_step(student, batch, teacher, plan=plan) for batch in batches):
        for name, ratio in jax.device_get(ratios).items():
            pair = np.array([ratio.total, ratio.weight], np.float64)
            if by == "batch":
                pair /= max(pair[1], 1e-30)
            totals[name] = totals.get(name, 0.0) + pair
    return {name: float(total / max(weight, 1e-30)) for name, (total, weight) in totals.items()}


def predict(model: Model, stream, mesh: Mesh, table: Table) -> dict[int, np.ndarray]:
    """The logits of every row of a one-pass stream, by the row's id: (C,) where a row has one
    answer, (P, length) for P answers over its tokens, padding cut off. Float32.

    All processes call this together, and all get every row.
    """
    found: dict[int, np.ndarray] = {}
    answered = (
        (batch, predict_step(model, place(batch, mesh), mesh=mesh, table=table))
        for batch in stream.batches()
    )
    for batch, logits_BPC in one_behind(answered):
        lengths_B = batch.mask_BT.sum(axis=1).astype(np.int32)
        ids_B, spans = batch.ids_B, batch.labels.shape[1] > 1
        if jax.process_count() > 1:
            ids_B, lengths_B = multihost_utils.process_allgather((ids_B, lengths_B), tiled=True)
            logits_BPC = multihost_utils.process_allgather(logits_BPC, tiled=True)
        for row, length, logits_PC in zip(
            ids_B, lengths_B, jax.device_get(logits_BPC), strict=True
        ):
            if row >= 0:  # the others fill the batch up
                found[int(row)] = logits_PC[:, :length].copy() if spans else logits_PC[0].copy()
    return found
