"""Estimates the memory that a step takes on one device, by kind, without compiling it.

Weights, moments and gradients follow from shapes and shardings. What blocks keep for the backward
pass is what JAX keeps of them; a compiler recomputes cheap arrays and fuses others, so an estimate
is usually above the compiled program's figure.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kd_jax.models import family
from kd_jax.models.blueprint import Blueprint
from kd_jax.objectives import vocab
from kd_jax.plans import alive
from kd_jax.run import measure
from kd_jax.run.run import Run
from kd_jax.run.stage import Stage
from kd_jax.train import sharding
from kd_jax.types import Batch, Params

Kinds = dict[str, int]  # bytes of one device


def on_device(tree: Any) -> int:
    """Sums the bytes that one device holds of arrays, by their shardings; abstract ones will do."""
    return sum(math.prod(_part(leaf)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def arguments(state: Any, batch: Any, teacher: Any) -> Kinds:
    """Computes the bytes of a step's arguments: the teacher's weights, the student's weights and
    moments, the batch."""
    return {
        "teacher": on_device([] if teacher is None else teacher.params),
        "weights": on_device(state.params),
        "moments": on_device(state.opt_state),
        "batch": on_device(batch),
    }


def estimate(run: Run, this: Stage, state: Any, batch: Any, teacher: Any) -> Kinds:
    """Estimates the bytes of a step: its `arguments`; gradients, split as their parameters are;
    kernels of one block, gathered; logits of one chunk; and activations.

    state, batch, teacher: the arguments of the step, with shardings.
    """
    found = arguments(state, batch, teacher)
    size = jnp.dtype(run.policy.operand).itemsize
    own = state.params["student"]
    gathered = _gathered(own, run.models[this.model], size + 4)  # and its gradient, float32
    if teacher is not None and isinstance(teacher.params, dict) and "backbone" in teacher.params:
        gathered += _gathered(teacher.params, run.models[this.teachers[0]], size)
    return found | {
        "gradients": sum(4 * math.prod(_part(leaf)) for leaf in jax.tree.leaves(state.params)),
        "gathered": gathered,
        "logits": chunk(run, this)["bytes"],
        "activations": _activations(run, this),
    }


def chunk(run: Run, this: Stage) -> dict[str, int]:
    """Computes the rows of a chunk of the vocabulary loss on one device, and the bytes of their
    float32 logits there: the student's, the teacher's, and the gradient. 0 without a vocabulary."""
    if run.head not in ("mlm", "clm"):
        return {"rows": 0, "bytes": 0}
    _, _, positions = measure.shape_of_step(run, this)
    objective, model, mesh = this.program.objective, run.models[this.model], run.config.mesh
    # The devices of fsdp compute their parts of the logits of each other's rows.
    devices = mesh.fsdp
    size = max(model.table_rows, model.config.vocab_size) // (devices * mesh.model)
    engine = vocab.Engine((), objective.student_policy, None, objective.chunk)
    rows = engine.rows_per_chunk(_micro_batch(run, this) * positions * devices, size)
    rows = -(-rows // devices) * devices
    return {"rows": rows, "bytes": 4 * rows * size * (3 if this.learns else 2)}


def kinds(born: Any, teacher: Any) -> Callable[[alive.Alive], str]:
    """Makes a function that tells what an array of a compiled step is, by its sizes: those of a
    kernel or table are its gradient's in float32, and the gathered parameter's in other types.

    born, teacher: the step's state and teacher, with shardings.
    """
    params, sizes, vocabularies = [born.params], set(), set()
    params += [] if teacher is None else [teacher.params]
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = sharding.path_name(path)
        shapes = {leaf.shape, leaf.sharding.shard_shape(leaf.shape)}
        if re.search(family.TABLES, name):
            vocabularies |= {shape[0] for shape in shapes}
        elif not name.endswith("kernel"):
            continue
        sizes |= {tuple(sorted(shape[-2:])) for shape in shapes}

    def kind(each: alive.Alive) -> str:
        dims = each.dims
        if sizes & {dims, *(dims[:i] + dims[i + 1 :] for i in range(len(dims)))}:  # or stacked
            return "gradients" if each.shape.startswith("f32") else "gathered"
        return "logits" if vocabularies & {*dims} else "activations"

    return kind


def _micro_batch(run: Run, this: Stage) -> int:
    """Counts the rows that a device computes at a time."""
    return this.batch_size // sharding.num_parts(run.mesh) // this.program.accumulate


def _part(leaf: Any) -> tuple[int, ...]:
    own = getattr(leaf, "sharding", None)
    return leaf.shape if own is None else own.shard_shape(leaf.shape)


def _gathered(params: Params, model: Blueprint, size: int) -> int:
    """Computes the bytes, `size` for each number, of the split kernels of one block, whole."""
    count = sum(
        math.prod(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if "blocks/" in sharding.path_name(path) and _part(leaf) != leaf.shape
    )
    return size * count // model.spec.num_layers


def _activations(run: Run, this: Stage) -> int:
    """Computes the bytes that the student's forward pass keeps for its backward pass; if blocks are
    computed again, what the blocks themselves keep for one of them at a time."""
    model = run.models[this.model]
    batch = run.tasks[this.model].shapes(_micro_batch(run, this))
    states = bool(this.program.objective.state_terms)
    kept, parts = _residuals(model, batch, states), run.config.mesh.model
    if not model.config.remat:
        return kept // parts
    plain = dataclasses.replace(model, config=dataclasses.replace(model.config, remat=False))
    inside = (_residuals(plain, batch, states) - kept) // model.spec.num_layers
    return kept + inside // parts


def _residuals(model: Blueprint, batch: Batch, states: bool) -> int:
    abstract = model.changed(model.name, model.config).abstract()
    layers = (model.spec.num_layers,)  # stacked blocks have an axis more
    of_params = {leaf.shape for leaf in jax.tree.leaves(abstract.params)}
    of_params |= {layers + shape for shape in of_params}

    def kept(params: Params, batch: Batch) -> list:
        def run(params: Params) -> Any:
            out = abstract.replace(params=params)(batch, jnp.uint32(0))
            return out.features, out.hidden if states else ()

        return jax.tree.leaves(jax.vjp(run, params)[1])

    found = jax.eval_shape(kept, abstract.params, batch)
    # Kernels in the operand type are kept as well: those are gathered again. A compiler keeps the
    # narrower arrays that float32 ones are made from, and of dropout nothing but the seed.
    widest = jnp.dtype(model.policy.activation).itemsize
    others = [x for x in found if x.shape not in of_params and x.dtype != jnp.bool]
    return sum(x.size * min(x.dtype.itemsize, widest) for x in others)
