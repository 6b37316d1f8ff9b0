"""Creates the training state on its devices, and changes its model during training."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from kd_jax.tensors import is_lazy
from kd_jax.train.sharding import Table, param_specs, put, shardings
from kd_jax.types import Array, Model, Params


class TrainState(struct.PyTreeNode):
    """The state that a step updates. `params` holds the student's parameters and the objective's.

    The structure of the student is static: the step is traced again for another structure.
    """

    step: Array  # int32, steps done
    params: Params  # {"student": ..., "objective": ...}
    opt_state: Any
    graphdef: nnx.GraphDef = struct.field(pytree_node=False)
    optimizer: optax.GradientTransformation = struct.field(pytree_node=False)

    @property
    def student(self) -> Model:
        """Returns the student as a `Model`."""
        return Model(self.params["student"], self.graphdef)


def state_specs(state: TrainState, table: Table, mesh: Mesh) -> TrainState:
    """Finds the PartitionSpecs of an (abstract) state; moments are split like their parameters."""
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
    """Creates a state with every array on its devices.

    Args:
        init: function from `inputs` to {"student", "objective"} parameters; runs under jit, unless
            there are lazy tensors in `inputs`, which it may only arrange.
        inputs: what parameters are made from: a random key, arrays, weights that are not read yet.
            They are arguments, since jit would compile arrays of a closure into the program. With
            jax.ShapeDtypeStructs the state is abstract too.
        graphdef: the student's structure.
        make_optimizer: makes the optimizer from abstract parameters.
        table: sharding table of the parameters.
        mesh: the mesh.
    """
    abstract = jax.eval_shape(init, inputs)  # once: tracing a model's first values takes long
    optimizer = make_optimizer(abstract)

    def state_of(params):
        return TrainState(jnp.int32(0), params, optimizer.init(params), graphdef, optimizer)

    shapes = jax.eval_shape(state_of, abstract)
    places = shardings(state_specs(shapes, table, mesh), mesh)
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(inputs)):
        return jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places
        )
    if not is_lazy(inputs):
        return jax.jit(lambda inputs: state_of(init(inputs)), out_shardings=places)(inputs)
    params = put(init(inputs), param_specs(table, abstract, mesh), mesh)
    rest = jax.jit(
        lambda params: state_of(params).replace(params=None),
        out_shardings=places.replace(params=None),
    )
    return rest(params).replace(params=params)


def continued(
    before: TrainState,
    student: Model,
    make_optimizer: Callable[[Params], optax.GradientTransformation],
    table: Table,
    mesh: Mesh,
) -> TrainState:
    """Makes a state with another student from the state `before`, at the same step.

    Optimizer state with the same path and shape in both is kept: moments and counts of parameters
    that stay in their group (`optim.Group`). The rest starts anew. Kept arrays are not copied, so
    the first step on the new state consumes `before`.

    Args:
        before: a state; its objective's parameters are kept.
        student: the new student; it may share parameters with `before`.
        make_optimizer: makes the optimizer from abstract parameters.
        table: sharding table of the parameters.
        mesh: the mesh.
    """
    params = {"student": student.params, "objective": before.params["objective"]}
    optimizer = make_optimizer(jax.eval_shape(lambda x: x, params))
    shapes = jax.eval_shape(optimizer.init, params)
    state = before.replace(
        params=params, opt_state=shapes, graphdef=student.graphdef, optimizer=optimizer
    )
    places = shardings(state_specs(state, table, mesh), mesh)
    params = jax.device_put(params, places.params)
    kept = _by_path(before.opt_state)
    same = {
        path: path in kept and kept[path].shape == leaf.shape
        for path, leaf in _by_path(shapes).items()
    }

    def start(params):
        found = _by_path(optimizer.init(params))
        return {path: leaf for path, leaf in found.items() if not same[path]}

    place_of = _by_path(places.opt_state)
    fresh_places = {path: place_of[path] for path in same if not same[path]}
    fresh = jax.jit(start, out_shardings=fresh_places)(params)
    leaves = [kept[path] if stays else fresh[path] for path, stays in same.items()]
    opt_state = jax.tree.unflatten(jax.tree.structure(shapes), leaves)
    return state.replace(params=params, opt_state=opt_state)


def _by_path(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def abstract(state: TrainState) -> TrainState:
    """Describes a state's shapes, types and shardings: a checkpoint is restored against these."""
    describe = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)  # noqa: E731
    return jax.tree.map(describe, state)


_MOMENT = 3e-4  # seconds


def settle(state: TrainState) -> TrainState:
    """Waits on a CPU until the step that computes `state` has given its memory back; returns it.

    A step's temporary arrays are allocated as it is asked for, beside those of a step that has not
    ended. Another thread frees them just after the results are there: it gets a moment, if there
    was anything to wait for.
    """
    if jax.default_backend() == "cpu" and not state.step.is_ready():
        jax.block_until_ready(state.step)
        time.sleep(_MOMENT)
    return state
