"""Initializes students with their teacher's parameters."""

import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from kd_jax.errors import UserError
from kd_jax.models import family
from kd_jax.tensors import LazyTensor
from kd_jax.types import Model, Params

log = logging.getLogger(__name__)


def layer_map(layers: str | list[int] | tuple[int, ...], student: int, teacher: int) -> list[int]:
    """Chooses the teacher layer that each student layer copies; layers count from 0.

    `student` and `teacher` are numbers of layers. "first" and "last" take consecutive layers.
    "uniform" spreads them so that a student layer ends at the same relative depth as its teacher
    layer, like the uniform map of the hidden objective: 12 to 6 is 1, 3, 5, 7, 9, 11. A list is
    taken unchanged. Raises UserError for an invalid choice.
    """
    if not isinstance(layers, str):
        chosen = list(layers)
        if len(chosen) != student or not all(0 <= layer < teacher for layer in chosen):
            raise UserError(
                f"layers={chosen}: want {student} numbers, one for each student layer, "
                f"from 0 to {teacher - 1}"
            )
        return chosen
    if student > teacher:
        raise UserError(f"the student has {student} layers, the teacher only {teacher}")
    if layers == "first":
        return list(range(student))
    if layers == "last":
        return list(range(teacher - student, teacher))
    if layers == "uniform":
        return [round((i + 1) * teacher / student) - 1 for i in range(student)]
    raise UserError(f"layers={layers!r}: have 'uniform', 'first', 'last', or a list of numbers")


# Numbers that have to be the teacher's for its parameters to fit, and to mean the same.
_SAME = (
    "width",
    "ffn_width",
    "vocab_size",
    "num_heads",
    "activation",
    "head_activation",
    "normalization",
    "tie_embeddings",
    "skip_padding",
    "scale_scores",
    "scale_by_layer",
    "score_width",
    "scale_embeddings",
    "rotary",
    "local_rotary",
    "rms_norm",
    "offset_norms",
    "norms",
    "qk_norm",
    "parallel",
    "gated",
)


def from_teacher(student: Model, teacher: Model, layers: str | list[int]) -> Model:
    """Copies the teacher's embeddings, head, and the layers of `layer_map` to a student.

    A head of another shape or kind (other classes, no pooler) is not copied at all: the student
    keeps its own, which its `params` must then hold; everything else in them may be abstract. If
    the student (DistilBERT) lacks the teacher's token types, the teacher's type 0 is added to the
    student's positions, so that the embedding output stays the same. A shorter position table takes
    the first rows. The teacher may be abstract, or lazy tensors. Raises UserError if widths or
    other sizes differ.
    """
    mine, its = _config(student), _config(teacher)
    for name in _SAME:
        _agree(name, getattr(its, name, None), getattr(mine, name, None))
    ours, theirs = student.params["backbone"], teacher.params["backbone"]
    chosen = layer_map(layers, mine.num_layers, its.num_layers)
    for i, layer in enumerate(chosen):  # which the shapes of parameters need not tell
        _agree(f"block {layer}, the student's {i},", its.shape(layer), mine.shape(i))
        what, each = f"of block {layer}, the student's {i}, the ", ((its, layer), (mine, i))
        _agree(f"{what}window (layer_types)", *(one.window_of(at) for one, at in each))
        rotated = (one.rotary_of(at) is not None for one, at in each)
        _agree(f"{what}rotary embedding (no_rope_layers)", *rotated)
        if parts := theirs["blocks"][layer].keys() ^ ours["blocks"][i].keys():
            raise UserError(
                f"student.init from teacher layers: {', '.join(sorted(parts))} is in only one of "
                f"block {layer} and the student's block {i}; choose other layers (the first block "
                f"of a ModernBERT is unlike all others: layers=[0, ...])"
            )
    blocks = {i: theirs["blocks"][layer] for i, layer in enumerate(chosen)}
    if getattr(mine, "scale_by_layer", False):
        blocks = {i: _rescaled(blocks[i], (i + 1) / (layer + 1)) for i, layer in enumerate(chosen)}
    backbone = theirs | {"blocks": blocks}
    if "positions" in theirs:
        positions = theirs["positions"]["embedding"][: mine.max_positions]
        if "types" in theirs and "types" not in ours:
            positions = positions + theirs["types"]["embedding"][:1]
        backbone["positions"] = {"embedding": positions}
    head = _head(student, teacher)
    return student.replace(params=_take(student.params, {"backbone": backbone, "head": head}))


def _agree(what: str, teacher: Any, student: Any) -> None:
    """Raises UserError if a property is not the same in both models."""
    if teacher != student:
        raise UserError(
            f"student.init from teacher layers: {what} is {teacher!r} in the teacher and "
            f"{student!r} in the student; make them the same, or start the student from scratch"
        )


def _head(student: Model, teacher: Model) -> Params:
    """Chooses the teacher's head if the student's is of the same kind and shape, else its own."""
    mine, its = (model.params.get("head", {}) for model in (student, teacher))
    if _kind(student) == _kind(teacher):
        return its
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(mine)):
        raise UserError(
            "student.init from teacher layers: the teacher's head is not like the student's, which "
            "has no values of its own; make them the same, or start from scratch"
        )
    _say("the teacher's head is not like the student's, which keeps its own random values")
    return mine


def _kind(model: Model) -> Any:
    """Collects the properties that must agree to copy one head's parameters to another."""
    head, config = model.params.get("head", {}), _config(model)
    shapes = {path: leaf.shape for path, leaf in family.flatten(head).items()}
    if "classifier" not in head:
        return shapes, None
    return shapes, (config.pooler, config.classifier_pooling, config.labels)


@functools.cache
def _say(message: str) -> None:
    """Logs a message only once, although the function that calls it is traced repeatedly."""
    log.info(message)


def _config(model: Model) -> Any:
    return nnx.merge(model.graphdef, model.params).backbone.config


def _rescaled(block: Params, factor: float) -> Params:
    """Scales a block's queries for a layer whose attention scores are scaled differently."""
    q = jax.tree.map(lambda x: x * factor, block["attention"]["q"])
    return block | {"attention": block["attention"] | {"q": q}}


def _take(student: Params, source: Params) -> Params:
    """Copies the source's arrays into the student's tree; lazy tensors stay so."""
    have, taken = family.flatten(source), {}
    for path, wanted in family.flatten(student).items():
        _agree(path, have[path].shape if path in have else "missing", wanted.shape)
        given = have[path]
        lazy = isinstance(given, LazyTensor)
        taken[path] = given.astype(wanted.dtype) if lazy else jnp.array(given, wanted.dtype)
    return family.unflatten(taken, student)
