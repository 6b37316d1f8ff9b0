"""Names the axes of the device mesh, and defines the collectives of modules and losses over them.

    data    rows of a batch
    fsdp    rows of a batch, and parts of parameters, gradients and moments (ZeRO, Rajbhandari et
            al., arXiv:1910.02054); two axes, so that each may lie along one dimension of a torus
    model   heads, FFN columns and ids of the vocabulary (tensor parallelism, Shoeybi et al.,
            "Megatron-LM", arXiv:1909.08053); the rows are the same

Modules run inside `jax.shard_map` on the parts that a device holds. Whether an array is a part can
be seen from its shape, since modules know the whole one: nothing here happens outside a mesh, or
over axes of size 1.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

FSDP = ("fsdp", "fsdp2")
MODEL = "model"
ROWS = ("data", *FSDP)  # over which a batch is split
VOCAB = (*FSDP, MODEL)  # over which tables over the vocabulary are split
AXES = (*ROWS, MODEL)


def _real(axes: Sequence[str]) -> tuple[str, ...]:
    """Leaves out axes of size 1."""
    return tuple(axis for axis in axes if jax.lax.axis_size(axis) > 1)


def size(axes: Sequence[str]) -> int:
    """Counts the devices along axes; inside shard_map."""
    return math.prod(jax.lax.axis_size(axis) for axis in axes)


def index(axes: Sequence[str]) -> Array:
    """Returns this device's number along axes, the first axis first, uint32; inside shard_map."""
    number = jnp.uint32(0)
    for axis in axes:
        own = jax.lax.axis_index(axis).astype(jnp.uint32)
        number = number * jnp.uint32(jax.lax.axis_size(axis)) + own
    return number


def total(x: Any, axes: Sequence[str]) -> Any:
    """Sums the arrays of all devices along axes."""
    axes = _real(axes)
    return jax.lax.psum(x, axes) if axes else x


def largest(x: Any, axes: Sequence[str]) -> Any:
    """Computes the largest of all devices' values along axes."""
    axes = _real(axes)
    return jax.lax.pmax(x, axes) if axes else x


def gathered(part: Array, axes: Sequence[str]) -> Array:
    """Joins the rows of all devices along axes."""
    axes = _real(axes)
    return jax.lax.all_gather(part, axes, tiled=True) if axes else part


def scattered(x: Array, axes: Sequence[str]) -> Array:
    """Sums the arrays of all devices along axes; each keeps its part of the rows.

    One mesh axis after the other: TPUs reduce and scatter at once only along one dimension of a
    torus, and otherwise reduce whole arrays and cut them.
    """
    for name in _real(axes):
        x = jax.lax.psum_scatter(x, name, tiled=True)
    return x


def by_rows(part_NV: Array) -> Array:
    """Exchanges columns for rows: from this device's columns, of those along VOCAB, of all rows
    along FSDP, to all columns of this device's rows."""
    if model := _real((MODEL,)):
        part_NV = jax.lax.all_gather(part_NV, model, axis=1, tiled=True)
    if fsdp := _real(FSDP):
        part_NV = jax.lax.all_to_all(part_NV, fsdp, split_axis=0, concat_axis=1, tiled=True)
    return part_NV


def own(rows: Array, axes: Sequence[str]) -> Array:
    """Cuts the rows of this device out of those that devices along axes gathered."""
    if not axes:
        return rows
    count = len(rows) // size(axes)
    return jax.lax.dynamic_slice_in_dim(rows, index(axes).astype(jnp.int32) * count, count)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def summed(x: Array, axes: Sequence[str]) -> Array:
    """Sums parts along axes, where what follows is the same on all of them: each device's part has
    the sum's gradient."""
    return total(x, axes)


summed.defvjp(lambda x, axes: (total(x, axes), None), lambda axes, _, g: (g,))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def shared(x: Array, axes: Sequence[str]) -> Array:
    """Returns x, of which each device along axes goes on to compute a part of something: its
    gradient is the sum of theirs."""
    return x


shared.defvjp(lambda x, axes: (x, None), lambda axes, _, g: (total(g, axes),))


def whole_table(part: Array, rows: int) -> Array:
    """Gathers a table over the vocabulary, and cuts padding at its end: `rows` rows are left."""
    return (part if part.shape[0] >= rows else _joined(part))[:rows]


@jax.custom_vjp
def _joined(part: Array) -> Array:
    return gathered(part, VOCAB)


def _joined_bwd(_, g: Array) -> tuple[Array]:
    return (own(scattered(g, FSDP), (MODEL,)),)  # along `model` all have the same


_joined.defvjp(lambda part: (_joined(part), None), _joined_bwd)
