"""Defines the train step.

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

from kd_jax import axes
from kd_jax.train import optim, sharding
from kd_jax.train.micro_batches import over_micro_batches, with_cached_vectors
from kd_jax.train.state import TrainState
from kd_jax.types import Array, Batch, Model, ModelOutput, Params, Ratio


class Inputs(struct.PyTreeNode):
    """The scheduled numbers of one step, evaluated on the host, so that they never recompile."""

    learning_rate: Array
    coefficients: dict[str, Array]
    temperatures: dict[str, Array]
    seed: Array  # uint32, new at every step: dropout
    replaced_L: Array | None = None  # bool, drawn at every step: blocks in predecessors' places


class Teacher(Protocol):
    """A callable that computes a student's targets: a `Model`, or a pytree of kd_jax/teachers."""

    params: Params

    def replace(self, *, params: Params) -> Teacher: ...

    def __call__(self, batch: Batch) -> ModelOutput: ...


class Objective(Protocol):
    """The interface of an objective (kd_jax/objectives/objective.py)."""

    names: list[str]
    compares_rows: bool  # whether a term compares rows of the batch with each other

    def parts(self) -> tuple[Objective, Objective]: ...

    def dense_labels(self, batch: Batch) -> Batch: ...

    def denominators(self, batch: Batch) -> dict[str, Array]: ...

    def __call__(self, params, student, teacher, batch, scales, temperatures): ...


@dataclasses.dataclass(frozen=True)
class Program:
    """The static arguments of a step."""

    objective: Objective
    mesh: Mesh
    table: sharding.Table
    accumulate: int = 1  # micro-batches a step, one after the other
    dropout: bool = True

    @property
    def caches_vectors(self) -> bool:
        """Tells whether all micro-batches' vectors are computed before any gradient."""
        return self.accumulate > 1 and self.objective.compares_rows


def global_denominators(objective: Objective, batch: Batch) -> dict[str, Array]:
    """Sums each term's denominator over all devices; inside shard_map."""
    local = objective.denominators(batch)
    return {name: axes.total(total, axes.ROWS) for name, total in local.items()}


def ratios(totals: dict[str, Array], denominators: dict[str, Array]) -> dict[str, Ratio]:
    """Sums each term's total over all devices: Ratios of totals and denominators."""
    return {
        name: Ratio(axes.total(total, axes.ROWS), denominators[name])
        for name, total in totals.items()
    }


def gradient(
    state: TrainState, batch: Batch, teacher: Teacher | None, inputs: Inputs, program: Program
) -> tuple[Params, dict[str, Ratio]]:
    """Computes the gradient of the global batch, sharded like the parameters, and each term's
    Ratio."""
    objective = program.objective
    specs = sharding.param_specs(program.table, state.params, program.mesh)

    def local(state, teacher, batch, inputs):
        batch = objective.dense_labels(batch)
        denominators = global_denominators(objective, batch)
        scales = {
            name: inputs.coefficients[name]
            / jnp.where(denominators[name] > 0, denominators[name], 1.0)
            for name in objective.names
        }

        numbers = scales, inputs.temperatures

        def run(params, rows, seed):
            targets = None if teacher is None else jax.lax.stop_gradient(teacher(rows))
            student = Model(params["student"], state.graphdef)
            return student(rows, seed if program.dropout else None, inputs.replaced_L), targets

        def loss(params, rows, seed):
            return objective(params["objective"], *run(params, rows, seed), rows, *numbers)

        seed = inputs.seed + axes.index(axes.ROWS) * jnp.uint32(0x9E3779B9)
        given = state.params, batch
        if program.caches_vectors:
            how = numbers, seed, program.accumulate
            grads, totals = with_cached_vectors(run, objective, *given, *how)
        else:
            both = jax.grad(loss, has_aux=True)
            grads, totals = over_micro_batches(both, *given, seed, program.accumulate)
        return sharding.reduce(grads, specs), ratios(totals, denominators)

    models, out = (state, teacher), (specs, P())
    return sharding.per_device(local, program.mesh, program.table, models, batch, inputs, out=out)


@functools.partial(jax.jit, static_argnames="program", donate_argnames="state")
def train_step(
    state: TrainState, batch: Batch, teacher: Teacher | None, inputs: Inputs, *, program: Program
) -> tuple[TrainState, dict[str, Any]]:
    """Takes one optimizer step on a global batch.

    Returns the new state (the old one is donated) and {"loss", "grad_norm", "terms"}: the
    weighted loss, the gradient's norm before clipping, and a Ratio for each term.
    """
    grads, terms = gradient(state, batch, teacher, inputs, program)
    params, opt_state = optim.apply(
        state.optimizer, grads, state.opt_state, state.params, inputs.learning_rate
    )
    loss = sum(inputs.coefficients[name] * terms[name].value() for name in program.objective.names)
    metrics = {"loss": loss, "grad_norm": optim.global_norm(grads), "terms": terms}
    return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics
