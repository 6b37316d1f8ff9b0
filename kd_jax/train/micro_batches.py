"""Computes the gradient of a batch micro-batch by micro-batch, exactly; inside shard_map."""

from typing import Any

import jax
import jax.numpy as jnp

from kd_jax.types import Array, Batch, ModelOutput, Params


def _micro_batches(rows: Any, seed: Array, count: int) -> tuple[Any, Array]:
    """Cuts arrays by rows into `count` micro-batches, each with a seed of its own."""
    parts = jax.tree.map(lambda x: x.reshape(count, x.shape[0] // count, *x.shape[1:]), rows)
    return parts, seed + jnp.arange(count, dtype=jnp.uint32) * jnp.uint32(0x85EBCA6B)


def over_micro_batches(gradient, params: Params, rows: Any, seed: Array, count: int):
    """Sums the results of `gradient` over `count` micro-batches, one after the other."""
    if count == 1:
        return gradient(params, rows, seed)

    def add(sums, micro):
        return jax.tree.map(jnp.add, sums, gradient(params, *micro)), None

    micro_batches = _micro_batches(rows, seed, count)
    first = jax.tree.map(lambda x: x[0], micro_batches)
    shapes = jax.eval_shape(gradient, params, *first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(add, zeros, micro_batches)[0]


def with_cached_vectors(
    run, objective: Any, params: Params, batch: Batch, numbers: tuple, seed: Array, count: int
):
    """Computes (gradient, totals) of an objective with terms that compare texts of different
    micro-batches.

    GradCache, Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited
    Setup", arXiv:2101.06983: first all vectors, without a gradient; then these terms, and their
    gradient by the vectors; then each micro-batch again, backwards from its part of that gradient.

    Args:
        run: (params, rows, seed) -> (the student's output, its targets or None).
        objective: its terms, and their `parts`.
        params: of the step, with those of the objective.
        batch: all rows of this device.
        numbers: scales and temperatures of the terms.
        seed: of dropout; a micro-batch has the same one both times.
        count: micro-batches.
    """
    apart, across = objective.parts()

    def vectors(_, micro):
        output, targets = run(params, *micro)
        return None, (output.features, None if targets is None else targets.features)

    found = jax.lax.scan(vectors, None, _micro_batches(batch, seed, count))[1]
    ours, theirs = jax.tree.map(
        lambda x: ModelOutput(x.reshape(-1, *x.shape[2:]), None, None), found
    )

    def compared(output):
        return across({}, output, theirs, batch, *numbers)

    slopes, totals = jax.grad(compared, has_aux=True)(ours)

    def loss(params, rows, seed):
        rows, slopes_B1D = rows
        output, targets = run(params, rows, seed)
        value, totals = apart(params["objective"], output, targets, rows, *numbers)
        return value + jnp.sum(output.features * slopes_B1D), totals

    both, rows = jax.grad(loss, has_aux=True), (batch, slopes.features)
    grads, others = over_micro_batches(both, params, rows, seed, count)
    return grads, totals | others
