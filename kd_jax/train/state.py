"""The training state, born on its devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from kd_jax.train.sharding import Table, param_specs, shardings
from kd_jax.types import Array, Model, Params


class TrainState(struct.PyTreeNode):
    """What a step changes. `params` holds the student and, apart, the objective's own.

    The structure of the student is static: a student of another shape retraces the step, once.
    """

    step: Array  # int32, steps done
    params: Params  # {"student": ..., "objective": ...}
    opt_state: Any
    graphdef: nnx.GraphDef = struct.field(pytree_node=False)
    optimizer: optax.GradientTransformation = struct.field(pytree_node=False)

    @property
    def student(self) -> Model:
        """The student as a model."""
        return Model(self.params["student"], self.graphdef)


def state_specs(state: TrainState, table: Table, mesh: Mesh) -> TrainState:
    """PartitionSpecs of an (abstract) state; optimizer moments lie where their parameters do."""
    specs = param_specs(table, state.params, mesh)
    frozen = optax.MaskedNode  # stands where a frozen parameter would have moments
    opt_specs = optax.tree_utils.tree_map_params(
        state.optimizer,
        lambda moment, spec: moment if isinstance(moment, frozen) else spec,
        state.opt_state,
        specs,
        transform_non_params=lambda _: P(),
        is_leaf=lambda x: isinstance(x, P | frozen),
    )
    return state.replace(step=P(), params=specs, opt_state=opt_specs)


def create(
    init: Callable[[Any], Params],
    inputs: Any,
    graphdef: nnx.GraphDef,
    make_optimizer: Callable[[Params], optax.GradientTransformation],
    table: Table,
    mesh: Mesh,
) -> TrainState:
    """A new state whose every array is created where it will live.

    Args:
        init: from `inputs` to {"student", "objective"} parameters; runs under jit.
        inputs: arrays that parameters are made from: a random key, weights that were read. They
            are arguments, since what a jitted function closes over is compiled into it. With
            jax.ShapeDtypeStructs the state is abstract too.
        graphdef: the student's structure.
        make_optimizer: from abstract parameters.
        table: sharding table of the parameters.
        mesh: the mesh.
    """
    optimizer = make_optimizer(jax.eval_shape(init, inputs))

    def start(inputs):
        params = init(inputs)
        return TrainState(jnp.int32(0), params, optimizer.init(params), graphdef, optimizer)

    shapes = jax.eval_shape(start, inputs)
    places = shardings(state_specs(shapes, table, mesh), mesh)
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(inputs)):
        return jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places
        )
    return jax.jit(start, out_shardings=places)(inputs)


def abstract(state: TrainState) -> TrainState:
    """The state's shapes, types and shardings: what a checkpoint is restored against."""
    describe = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)  # noqa: E731
    return jax.tree.map(describe, state)
