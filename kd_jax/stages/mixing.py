"""Learns weights of an ensemble's members that bring their mean closest to the teacher on held-out
text."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kd_jax.models import blueprint
from kd_jax.objectives.logits import head_of, in_chunks
from kd_jax.precision import Policy
from kd_jax.run.run import Run
from kd_jax.stages.round import vocab_size
from kd_jax.teachers import ensemble
from kd_jax.train import sharding
from kd_jax.types import Array, Batch, Model, Params

log = logging.getLogger(__name__)

STEPS, RATE, BATCHES = 100, 0.1, 8  # of Adam; held-out batches that it sees
CHUNK = 256  # tokens whose logits exist at a time


def learned(run: Run, teacher: Model, members: Sequence[Params]) -> list[float]:
    """Learns the members' weights, which sum to 1, by minimizing KL(teacher || mean) on the
    validation split, starting from equal weights. Runs on one device."""
    device = run.mesh.local_devices[0]
    kept = [blueprint.stored(sharding.to_host(member), run.policy) for member in members]
    stacked = jax.device_put(ensemble.stack(kept), device)
    graphdef = run.models["student"].stacked
    rows = run.task.held_out("validation", run.config.eval.batch_size)
    batches = [jax.device_put(rows[step], device) for step in range(min(rows.steps, BATCHES))]
    alone = Model(jax.device_put(sharding.to_host(teacher.params), device), teacher.graphdef)
    how = dict(size=vocab_size(run), space=run.config.ensemble.space, policy=run.policy)
    logits_E, optimizer = jnp.zeros(len(members)), optax.adam(RATE)
    state = optimizer.init(logits_E)
    for step in range(STEPS):
        batch = batches[step % len(batches)]
        slope_E = _slope(logits_E, alone, stacked, graphdef, batch, **how)
        updates, state = optimizer.update(slope_E, state)
        logits_E = optax.apply_updates(logits_E, updates)
    weights = np.asarray(jax.nn.softmax(logits_E), np.float64)
    log.info("learned weights: %s", ", ".join(f"{weight:.3f}" for weight in weights))
    return weights.tolist()


@functools.partial(jax.jit, static_argnames=("graphdef", "size", "space", "policy"))
def _slope(
    logits_E: Array,
    teacher: Model,
    members: Params,
    graphdef: Any,
    batch: Batch,
    *,
    size: int,
    space: str,
    policy: Policy,
) -> Array:
    """Computes the gradient of a batch's mean KL with respect to the weights' logits, (E,)."""
    theirs = head_of(teacher(batch)).cut(size)
    weights_N = batch.weights.reshape(-1)

    def loss(logits_E):
        weights_E = jax.nn.softmax(logits_E)
        ours = ensemble.members(members, graphdef, weights_E, batch, space).cut(size)

        @jax.checkpoint
        def chunk(total, parts):
            own_rows, their_rows, weights_C = parts
            p_CV = jax.nn.log_softmax(theirs.logits(their_rows, policy), axis=1)
            q_CV = jax.nn.log_softmax(ours.logits(own_rows, policy), axis=1)
            kl_C = (jnp.exp(p_CV) * (p_CV - q_CV)).sum(axis=1)
            return total + jnp.where(weights_C > 0, kl_C, 0.0).sum(), None

        parts = in_chunks((ours.rows, theirs.rows, weights_N), CHUNK)
        total, _ = jax.lax.scan(chunk, jnp.float32(0.0), parts)
        return total / (weights_N > 0).sum()

    return jax.grad(loss)(logits_E)
