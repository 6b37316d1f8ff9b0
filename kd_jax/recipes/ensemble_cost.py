"""What a model, or the mean of several of one shape, costs to compute, timed on one device: one row
of the task's length at a time, and 32 of them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kd_jax.evals import cost
from kd_jax.objectives.sources import in_chunks
from kd_jax.precision import Policy
from kd_jax.recipes import blueprint
from kd_jax.recipes.ensemble_setup import EnsembleSetup
from kd_jax.teachers import ensemble
from kd_jax.train import sharding
from kd_jax.types import Array, Batch, Params

ROWS, CALLS, SECONDS = 32, 20, 5.0
CHUNK = 256  # tokens whose logits exist at a time


def measure(setup: EnsembleSetup, name: str, members: Sequence[Params]) -> dict[str, Any]:
    """`evals.cost.measure` of the first choice of every token of real rows. `name`: the model that
    the members are of; all processes call this together."""
    device = jax.local_devices()[0]
    kept = [blueprint.stored(sharding.to_host(member), setup.policy) for member in members]
    stacked = jax.device_put(ensemble.stack(kept), device)
    graphdef = setup.models[name].stacked
    space, policy = setup.config.ensemble.space, setup.policy

    def call(rows: int) -> Any:
        batch = jax.device_put(setup.task.held_out(setup.reported, rows)[0], device)
        return lambda: jax.block_until_ready(
            _first_choices(stacked, graphdef, batch, space=space, policy=policy)
        )

    return cost.measure(call(1), call(ROWS), batch_size=ROWS, repeats=CALLS, budget_s=SECONDS)


@functools.partial(jax.jit, static_argnames=("graphdef", "space", "policy"))
def _first_choices(
    members: Params, graphdef: Any, batch: Batch, *, space: str, policy: Policy
) -> Array:
    count = len(jax.tree.leaves(members)[0])
    weights_E = jnp.full(count, 1.0 / count)
    found = ensemble.members(members, graphdef, weights_E, batch, space)
    rows = in_chunks(found.rows, min(CHUNK, len(found.rows)))
    return jax.lax.map(lambda part: found.logits(part, policy).argmax(axis=1), rows)
