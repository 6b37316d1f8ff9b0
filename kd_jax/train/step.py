"""THE train step and the eval step.

Teacher forward, student forward and backward, and the optimizer are one program. The gradient is
computed per device inside `shard_map` on the device's own rows; the loss is a sum of terms, each a
weighted sum over its GLOBAL denominator, so neither the number of devices nor accumulation
changes it (denominators come first, from the data alone).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from kd_jax.train import optim, sharding
from kd_jax.train.state import TrainState
from kd_jax.types import Array, Batch, Model, ModelOutput, Params, Ratio


class Inputs(struct.PyTreeNode):
    """Numbers of one step: schedules are evaluated on the host, so they never recompile."""

    learning_rate: Array
    coefficients: dict[str, Array]
    temperatures: dict[str, Array]
    seed: Array  # uint32, new at every step: dropout
    # bool, drawn at every step: blocks in their predecessors' place
    replaced_L: Array | None = None


class Teacher(Protocol):
    """What answers beside the student: a `Model`, or a pytree of kd_jax/teachers."""

    params: Params

    def replace(self, *, params: Params) -> Teacher: ...

    def __call__(self, batch: Batch) -> ModelOutput: ...


class Objective(Protocol):
    """What the step needs of an objective (kd_jax/objectives/objective.py)."""

    names: list[str]

    def dense_labels(self, batch: Batch) -> Batch: ...

    def denominators(self, batch: Batch) -> dict[str, Array]: ...

    def __call__(self, params, student, teacher, batch, scales, temperatures): ...


@dataclasses.dataclass(frozen=True)
class Program:
    """The static part of a step."""

    objective: Objective
    mesh: Mesh
    table: sharding.Table
    accumulate: int = 1  # micro-batches a step, one after the other
    dropout: bool = True


def _denominators(objective: Objective, batch: Batch) -> dict[str, Array]:
    """Global weight of each term, over all devices and micro-batches."""
    local = objective.denominators(batch)
    return {name: jax.lax.psum(weight, sharding.AXES) for name, weight in local.items()}


def _safe(weight: Array) -> Array:
    return jnp.where(weight > 0, weight, 1.0)


def _micro_batches(batch: Batch, count: int) -> Batch:
    return jax.tree.map(lambda x: x.reshape(count, x.shape[0] // count, *x.shape[1:]), batch)


def _local_gradient(params, graphdef, batch, teacher, inputs, program):
    """This device's share of the gradient and of every term's total, and the denominators."""
    objective = program.objective
    batch = objective.dense_labels(batch)
    weight = _denominators(objective, batch)
    scales = {name: inputs.coefficients[name] / _safe(weight[name]) for name in objective.names}
    seed = inputs.seed + sharding.device_index() * jnp.uint32(0x9E3779B9)

    def loss(params, rows, seed):
        teacher_out = None if teacher is None else jax.lax.stop_gradient(teacher(rows))
        student = Model(params["student"], graphdef)
        student_out = student(rows, seed if program.dropout else None, inputs.replaced_L)
        return objective(
            params["objective"], student_out, teacher_out, rows, scales, inputs.temperatures
        )

    gradient = jax.grad(loss, has_aux=True)
    if program.accumulate == 1:
        return *gradient(params, batch, seed), weight

    def add(carry, micro):
        rows, number = micro
        fresh = gradient(params, rows, seed + number * jnp.uint32(0x85EBCA6B))
        return jax.tree.map(jnp.add, carry, fresh), None

    micro = _micro_batches(batch, program.accumulate)
    numbers = jnp.arange(program.accumulate, dtype=jnp.uint32)
    first = jax.tree.map(lambda x: x[0], micro)
    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient, params, first, seed)
    )
    (grads, totals), _ = jax.lax.scan(add, zeros, (micro, numbers))
    return grads, totals, weight


def gradient(
    params: Params,
    graphdef,
    batch: Batch,
    teacher: Teacher | None,
    inputs: Inputs,
    program: Program,
) -> tuple[Params, dict[str, Ratio]]:
    """Computes the gradient of the global batch, laid out like the parameters, and each term's
    Ratio."""
    specs = sharding.param_specs(program.table, params, program.mesh)
    teacher_specs = None
    if teacher is not None:
        teacher_specs = sharding.param_specs(program.table, teacher.params, program.mesh)

    def local(params, batch, teacher_params, inputs):
        whole = sharding.gather(params, specs)
        if teacher is not None:
            frozen = teacher.replace(params=sharding.gather(teacher_params, teacher_specs))
        grads, totals, weight = _local_gradient(
            whole, graphdef, batch, None if teacher is None else frozen, inputs, program
        )
        ratios = {
            name: Ratio(jax.lax.psum(total, sharding.AXES), weight[name])
            for name, total in totals.items()
        }
        return sharding.reduce(grads, specs, program.mesh), ratios

    return jax.shard_map(
        local,
        mesh=program.mesh,
        in_specs=(specs, sharding.BATCH, teacher_specs, P()),
        out_specs=(specs, P()),
        check_vma=False,
    )(params, batch, None if teacher is None else teacher.params, inputs)


@functools.partial(jax.jit, static_argnames="program", donate_argnames="state")
def train_step(
    state: TrainState, batch: Batch, teacher: Teacher | None, inputs: Inputs, *, program: Program
) -> tuple[TrainState, dict[str, Any]]:
    """Takes one optimizer step on a global batch.

    Returns the new state (the old one is donated) and {"loss", "grad_norm", "terms"}: the
    weighted loss, the gradient's norm before clipping, and a Ratio for each term.
    """
    grads, terms = gradient(state.params, state.graphdef, batch, teacher, inputs, program)
    params, opt_state = optim.apply(
        state.optimizer, grads, state.opt_state, state.params, inputs.learning_rate
    )
    loss = sum(inputs.coefficients[name] * terms[name].value() for name in program.objective.names)
    metrics = {"loss": loss, "grad_norm": optim.global_norm(grads), "terms": terms}
    return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics


@functools.partial(jax.jit, static_argnames="program")
def eval_step(
    student: Model, batch: Batch, teacher: Teacher | None, *, program: Program
) -> dict[str, Ratio]:
    """Computes every term of `program.objective` on one batch, as Ratios over all devices; dropout
    off."""

    def local(student, teacher, batch):
        batch = program.objective.dense_labels(batch)
        teacher_out = None if teacher is None else teacher(batch)
        weight = _denominators(program.objective, batch)
        ones = dict.fromkeys(program.objective.names, jnp.float32(1.0))
        _, totals = program.objective({}, student(batch), teacher_out, batch, ones, {})
        return {n: Ratio(jax.lax.psum(t, sharding.AXES), weight[n]) for n, t in totals.items()}

    models = student, teacher
    return sharding.per_device(local, program.mesh, program.table, models, batch, out=P())


@functools.partial(jax.jit, static_argnames="program")
def teacher_is_finite(teacher: Teacher, batch: Batch, *, program: Program) -> Array:
    """Tells whether there is neither NaN nor +infinity in what a teacher returns for a batch, a
    bool scalar; -infinity is the logarithm of 0."""

    def local(teacher, batch):
        found = teacher(program.objective.dense_labels(batch))
        numbers = [x for x in jax.tree.leaves(found) if jnp.issubdtype(x.dtype, jnp.floating)]
        bad = sum(jnp.sum(~(x < jnp.inf)) for x in numbers)
        return jax.lax.psum(bad, sharding.AXES) == 0

    return sharding.per_device(local, program.mesh, program.table, (teacher,), batch, out=P())


@functools.partial(jax.jit, static_argnames=("mesh", "table"))
def predict_step(model: Model, batch: Batch, *, mesh: Mesh, table: sharding.Table) -> Array:
    """Computes float32 logits of a head that answers once a row, (B, P, C); dropout off."""
    local = lambda model, batch: model(batch).logits  # noqa: E731
    return sharding.per_device(local, mesh, table, (model,), batch)
