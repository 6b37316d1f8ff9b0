"""Measures models' latency and throughput, and counts the FLOPs of their training.

All models of a run are timed one after the other on one device.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kd_jax.data.loader import BucketStream
from kd_jax.metrics import cost, flops
from kd_jax.models import blueprint, family
from kd_jax.models.blueprint import count, size_mb
from kd_jax.objectives.logits import in_chunks
from kd_jax.precision import Policy
from kd_jax.run import text_logits
from kd_jax.run.run import Run
from kd_jax.run.stage import Parameters, Stage
from kd_jax.teachers import ensemble
from kd_jax.train import sharding
from kd_jax.train.passes import predict_step
from kd_jax.types import Array, Batch, Model, Params

ROWS = 32  # of a batch
BATCHES = 4  # that one timed pass goes through
CALLS, SECONDS = 20, 5.0  # of `measure_mean`: how often, and how long at most
CHUNK = 256  # tokens whose logits exist at a time


def measure(run: Run, params: dict[str, Params], repeats: int) -> dict[str, dict[str, Any]]:
    """Measures the cost of each model on examples: parameters, size_mb, flops_per_sample (at the
    mean length of a row), and the times of `metrics.cost.measure`. All are timed on the same
    examples of the reported split: one row at a time for the latency, batches of 32 for the
    throughput."""
    found = {}
    for name, own in params.items():
        rows = run.tasks[name].rows(run.split)
        tokens = round(float(rows.lengths_N.mean()))
        found[name] = {
            "parameters": count(own),
            "size_mb": size_mb(own),
            "flops_per_sample": flops.forward(own, 1, tokens, 1, vocabulary=False),
        }
    for name, own in params.items():
        one, many, samples = _calls(run, name, own)
        found[name] |= cost.measure(one, many, batch_size=samples, repeats=repeats)
    return found


def _calls(run: Run, name: str, params: Params) -> tuple[Callable, Callable, int]:
    """Makes the functions to time: (one, many, samples), where `one` runs the next single row and
    `many` the next `samples` rows."""
    device = jax.local_devices()[0]  # parameters may lie on all
    mesh = sharding.make_mesh(1, [device])
    model = Model(jax.device_put(params, device), run.models[name].abstract().graphdef)
    rows = run.tasks[name].rows(run.split)
    buckets = run.tasks[name].buckets_of(run.split)
    # The same examples for all models: drawn by number.
    ids_N = np.random.default_rng(0).permutation(len(rows))[: ROWS * BATCHES]

    def make(ids_B: np.ndarray, length: int) -> Batch:
        return rows.batch(ids_N[ids_B], length)

    def batches(size: int) -> list[Batch]:
        stream = BucketStream(rows.lengths_N[ids_N], buckets, make, size)
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


def measure_mean(run: Run, name: str, members: Sequence[Params], space: str) -> dict[str, Any]:
    """Times the prediction of every token of real rows by the mean of several models of one shape
    (`metrics.cost.measure`). `name`: the run's model with that shape; all processes call this
    together."""
    device = jax.local_devices()[0]
    kept = [blueprint.stored(sharding.to_host(member), run.policy) for member in members]
    stacked = jax.device_put(ensemble.stack(kept), device)
    graphdef = run.models[name].stacked

    def call(rows: int) -> Any:
        batch = jax.device_put(run.task.held_out(run.split, rows)[0], device)
        return lambda: jax.block_until_ready(
            _first_choices(stacked, graphdef, batch, space=space, policy=run.policy)
        )

    return cost.measure(call(1), call(ROWS), batch_size=ROWS, repeats=CALLS, budget_s=SECONDS)


@functools.partial(jax.jit, static_argnames=("graphdef", "space", "policy"))
def _first_choices(
    members: Params, graphdef: Any, batch: Batch, *, space: str, policy: Policy
) -> Array:
    size = len(jax.tree.leaves(members)[0])
    weights_E = jnp.full(size, 1.0 / size)
    found = ensemble.members(members, graphdef, weights_E, batch, space)
    rows = in_chunks(found.rows, min(CHUNK, len(found.rows)))
    return jax.lax.map(lambda part: found.logits(part, policy).argmax(axis=1), rows)


def shape_of_step(run: Run, stage: Stage) -> tuple[int, int, int]:
    """Counts rows and tokens of a batch, and positions of a row that reach the head."""
    batch = run.tasks[stage.model].shapes(stage.batch_size)
    positions = jax.eval_shape(stage.program.objective.dense_labels, batch).labels.shape[1]
    return *batch.tokens_BT.shape, positions


def of_training(run: Run, stage: Stage, parameters: Parameters) -> dict[str, int]:
    """Counts the steps and FLOPs of a stage's training (metrics/flops.py), including the teacher's
    forward passes: only one over each row if its logits are stored. If blocks are replaced at
    random, original and compact blocks both count."""
    shape, total = shape_of_step(run, stage), 0
    computing = stage.step_inputs(run, stage).computing
    for phase in stage.phases(run, parameters):
        params = phase.abstract().params
        models = params["student"], computing, params["objective"]
        total += (phase.end - phase.start) * flops.train_step(*models, *shape)
    if text_logits.are_kept(run, stage):  # the teacher, once over every row
        teacher = run.models[stage.teachers[0]].abstract().params
        total += text_logits.steps_of_new_rows(run, stage) * flops.forward(teacher, *shape)
    more = dict(stage.more_training)
    total += more.pop("training_flops", 0)
    return {"steps": stage.steps, "training_flops": total} | more
