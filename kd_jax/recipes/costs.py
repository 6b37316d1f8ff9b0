"""What each model of a run costs to run: parameters, size, FLOPs, latency, throughput.

All models are timed on the same examples of the reported split, on one device, in one sitting: one
row at a time for the latency, batches of 32 for the throughput.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from kd_jax.data.buckets import BucketStream
from kd_jax.evals import cost, flops
from kd_jax.models import family
from kd_jax.recipes import stage
from kd_jax.recipes.finetune_setup import FinetuneSetup
from kd_jax.train import sharding
from kd_jax.train.step import predict_step
from kd_jax.types import Batch, Model, Params

ROWS = 32  # of a batch
BATCHES = 4  # that one timed pass goes through


def measure(
    setup: FinetuneSetup, params: dict[str, Params], repeats: int
) -> dict[str, dict[str, Any]]:
    """For each model: parameters, size_mb, flops_per_sample (at the mean length of a row), and
    what `evals.cost.measure` gives."""
    found = {}
    for name, own in params.items():
        rows = setup.tasks[name].rows(setup.split)
        tokens = round(float(rows.lengths_N.mean()))
        found[name] = {
            "parameters": stage.count(own),
            "size_mb": stage.size_mb(own),
            "flops_per_sample": flops.forward(own, 1, tokens, 1, vocabulary=False),
        }
    for name, own in params.items():
        one, many, samples = _calls(setup, name, own)
        found[name] |= cost.measure(one, many, batch_size=samples, repeats=repeats)
    return found


def _calls(setup: FinetuneSetup, name: str, params: Params) -> tuple[Callable, Callable, int]:
    """(one, many, samples): a call runs the next single row, or batches of that many samples."""
    device = jax.local_devices()[0]  # parameters may lie on all
    mesh = sharding.make_mesh(1, [device])
    model = Model(jax.device_put(params, device), setup.models[name].abstract().graphdef)
    rows = setup.tasks[name].rows(setup.split)
    buckets = setup.tasks[name].buckets_of(setup.split)
    # The same examples for all models: drawn by number.
    ids_N = np.random.default_rng(0).permutation(len(rows))[: ROWS * BATCHES]

    def batches(size: int) -> list[Batch]:
        stream = BucketStream(rows.lengths_N[ids_N], buckets, _make(rows, ids_N), size)
        return [sharding.place(stream[i], mesh) for i in range(stream.steps)]

    def predict(batch: Batch) -> Any:
        return predict_step(model, batch, mesh=mesh, table=family.PARTITION)

    singles, groups = batches(1), batches(ROWS)
    turn = itertools.cycle(singles)
    for batch in singles:
        jax.block_until_ready(predict(batch))  # compiles each length
    return (
        lambda: jax.block_until_ready(predict(next(turn))),
        lambda: jax.block_until_ready([predict(batch) for batch in groups]),
        len(ids_N),
    )


def _make(rows: Any, ids_N: np.ndarray) -> Callable[[np.ndarray, int], Batch]:
    return lambda ids_B, length: rows.batch(ids_N[ids_B], length)
