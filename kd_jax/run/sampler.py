"""Writes text with a model that lies on a mesh, on all of its devices."""

from __future__ import annotations

import functools

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kd_jax.axes import AXES
from kd_jax.models.generate import Rule, Sampling, Written, write
from kd_jax.train.sharding import BATCH, Table, everywhere, per_device, place
from kd_jax.types import Array, Model


def write_on_mesh(
    mesh: Mesh,
    table: Table,
    model: Model,
    tokens_BT: np.ndarray,
    lengths_B: np.ndarray,
    limits_B: np.ndarray,
    rows_B: np.ndarray,
    seed: int,
    sampling: Sampling,
) -> Written:
    """Writes after prompts, `models.generate.write`, on all devices of the mesh.

    All processes call this together, each with its own rows, as many as its devices divide, T the
    same in all; on the mesh lie the rows of all of them, of `models.generate.Written`.

    Args:
        table: how the model's parameters are split.
        rows_B: int32 numbers of the rows among those of all processes; a row's draws depend on
            `seed` (0 to 2^32 - 1) and its number alone.
    """
    batch = tokens_BT, lengths_B, limits_B, rows_B
    batch = place(tuple(np.asarray(rows, np.int32) for rows in batch), mesh)
    numbers = everywhere((np.uint32(seed), sampling.rule()), mesh)
    return _write(model, batch, *numbers, room=sampling.max_new_tokens, mesh=mesh, table=table)


def lower(
    mesh: Mesh, table: Table, model: Model, shape: tuple[int, int], sampling: Sampling
) -> jax.stages.Lowered:
    """Lowers the program that writes after prompts of a shape (B, T), from an abstract model that
    knows its place on the mesh; on devices that need not be present."""

    def described(like: np.ndarray, spec: P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=NamedSharding(mesh, spec))

    rows = [np.zeros(shape, np.int32), *[np.zeros(shape[:1], np.int32)] * 3]
    batch = tuple(described(each, BATCH) for each in rows)
    numbers = np.uint32(0), sampling.rule()
    numbers = jax.tree.map(lambda each: described(np.asarray(each), P()), numbers)
    static = dict(room=sampling.max_new_tokens, mesh=mesh, table=table)
    return _write.lower(model, batch, *numbers, **static)


@functools.partial(jax.jit, static_argnames=("room", "mesh", "table"))
def _write(
    model: Model,
    batch: tuple[Array, ...],
    seed: Array,
    rule: Rule,
    *,
    room: int,
    mesh: Mesh,
    table: Table,
) -> Written:
    def local(model, batch, seed, rule):
        return write(model, *batch, seed, rule, room, AXES)

    return per_device(local, mesh, table, (model,), batch, seed, rule)
