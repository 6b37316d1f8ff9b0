"""Explains why a loss or a gradient is not finite, and what to do about it."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from kd_jax import axes
from kd_jax.train import sharding
from kd_jax.train.step import Program, Teacher
from kd_jax.types import Array, Batch


def likely_cause(
    update: int, teacher: Teacher | None, batch: Batch | None, program: Program
) -> str:
    """Explains why a loss or gradient of update `update` is not finite, and what to change;
    `batch`: the batch that it was computed from, if known."""
    asked = teacher is not None and batch is not None
    if asked and not teacher_is_finite(
        teacher, sharding.place(batch, program.mesh), program=program
    ):
        return (
            "the teacher's logits are not finite, so its weights are damaged or too large for "
            "config.precision; look at them, or take fp32"
        )
    known = "the teacher's logits are finite; " if asked else ""
    if update == 1:
        return (
            f"{known}nothing was updated before, so the parameters that the stage starts from are "
            f"not finite or too large for config.precision; look at them, or take fp32"
        )
    return f"{known}lower optim.learning_rate or set optim.clip_norm"


@functools.partial(jax.jit, static_argnames="program")
def teacher_is_finite(teacher: Teacher, batch: Batch, *, program: Program) -> Array:
    """Tells whether a teacher's output for a batch has no NaN or +infinity, a bool scalar;
    -infinity is allowed, the logarithm of 0."""

    def local(teacher, batch):
        found = teacher(program.objective.dense_labels(batch))
        numbers = [x for x in jax.tree.leaves(found) if jnp.issubdtype(x.dtype, jnp.floating)]
        bad = sum(jnp.sum(~(x < jnp.inf)) for x in numbers)
        return axes.total(bad, axes.ROWS) == 0

    return sharding.per_device(local, program.mesh, program.table, (teacher,), batch, out=P())
