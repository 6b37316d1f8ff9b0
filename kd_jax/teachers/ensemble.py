"""Teachers that are not one model in the step: logits that were computed before and come with the
batch (`Batch.stored`), several teachers as one, and a teacher with the earlier members of an
ensemble that the student is averaged with.

Logits and probabilities are different averages: the mean of logits is a geometric mean of the
distributions, which a teacher that is sure of itself dominates; the mean of probabilities is their
mixture (You et al., "Learning from Multiple Teacher Networks", KDD 2017, averages softened ones).
Members of one shape are stacked and run as one model under `vmap`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jax.sharding import PartitionSpec as P

from kd_jax.errors import UserError
from kd_jax.models import blueprint, family
from kd_jax.objectives.logits import SPACES, Members, Others, Targets, head_of, stored
from kd_jax.precision import Policy
from kd_jax.types import Array, Batch, Model, ModelOutput, Params

TEACHER, OTHERS = "teacher", "others"  # keys of `Batch.stored`
# Where the parameters of `EnsembleTeacher` lie: those of stacked members as one member's, behind E.
PARTITION = (("^(share|weights)$", P()), *family.PARTITION)


class Stored(struct.PyTreeNode):
    """A teacher whose stored logits come with the batch: all of them, or the largest of
    `num_classes`, with a `tail` (`objectives.logits.Sparse`), or draws."""

    num_classes: int = struct.field(pytree_node=False)
    tail: str = struct.field(pytree_node=False, default="uniform")
    params: Params = struct.field(default_factory=dict)

    def __call__(self, batch: Batch) -> ModelOutput | Targets:
        """Returns the stored logits for every label of the batch."""
        logits = batch.stored[TEACHER]
        if logits.ids_BPK is None:
            return ModelOutput(logits.values_BPK, None, None)
        return Targets(stored(logits, self.num_classes, self.tail), None)


class EnsembleTeacher(struct.PyTreeNode):
    """Computes the logits of a teacher and of the earlier members of an ensemble that the student
    joins.

    params: `teacher` and `members` (stacked, E on the first axis) if these run in the step;
    `weights`, (E,), of the members; `share`, the student's weight in the mean, 1 / (n + 1); without
    a share the student is alone.
    """

    params: Params
    vocab_size: int = struct.field(pytree_node=False)
    teacher: nnx.GraphDef | None = struct.field(pytree_node=False, default=None)
    member: nnx.GraphDef | None = struct.field(pytree_node=False, default=None)
    space: str = struct.field(pytree_node=False, default="logits")

    def __call__(self, batch: Batch) -> Targets:
        """Returns sources of the teacher's and the members' logits for every token of the batch."""
        if self.teacher is None:
            teacher = stored(batch.stored[TEACHER], self.vocab_size)
        else:
            teacher = head_of(Model(self.params["teacher"], self.teacher)(batch))
        if "share" not in self.params:
            return Targets(teacher, None)
        if self.member is None:
            others = stored(batch.stored[OTHERS], self.vocab_size)
        else:
            weights_E = self.params["weights"]
            others = members(self.params["members"], self.member, weights_E, batch, self.space)
        return Targets(teacher, Others(others, self.params["share"], self.space))


def members(
    params: Params, graphdef: nnx.GraphDef, weights_E: Array, batch: Batch, space: str
) -> Members:
    """Runs models with stacked parameters (E on the first axis), and averages their logits."""
    heads = jax.vmap(lambda params: head_of(Model(params, graphdef)(batch)).whole())(params)
    return Members(heads, weights_E, space)


def stack(models: Iterable[Params], policy: Policy) -> Params:
    """Stacks parameters of frozen models of one shape, E on the first axis, in operand types."""
    kept = [blueprint.stored(model, policy) for model in models]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *kept)


@dataclasses.dataclass(frozen=True)
class Member:
    """The static description of one of several teachers."""

    name: str
    graphdef: nnx.GraphDef
    weight: float  # of the average; the weights of all sum to 1
    order: tuple[int, ...] | None = None  # its class for each class of the task; None: the same
    encoding: int | None = None  # which of the batch's teacher_inputs it reads; None: the rows


class Several(struct.PyTreeNode):
    """Runs several teachers, with parameters by name, and averages their logits. Hidden states and
    attention are those of the first."""

    params: dict[str, Params]
    members: tuple[Member, ...] = struct.field(pytree_node=False)
    space: str = struct.field(pytree_node=False)  # logits | probabilities

    def __call__(self, batch: Batch) -> ModelOutput:
        """Computes the averaged logits, (B, P, C)."""
        outputs = [Model(self.params[m.name], m.graphdef)(_rows(batch, m)) for m in self.members]
        logits = [
            in_order(out.logits, m.order) for out, m in zip(outputs, self.members, strict=True)
        ]
        mixed = average(logits, [m.weight for m in self.members], self.space, jnp)
        return ModelOutput(mixed, None, None, outputs[0].hidden, outputs[0].attention)


def _rows(batch: Batch, member: Member) -> Batch:
    if member.encoding is None:
        return batch
    own = batch.teacher_inputs[member.encoding]
    return batch.replace(tokens_BT=own.tokens_BT, mask_BT=own.mask_BT, types_BT=own.types_BT)


def in_order(logits: Array, order: tuple[int, ...] | None) -> Array:
    """Reorders logits (..., C) to the task's order of classes."""
    return logits if order is None else logits[..., list(order)]


def average(logits: list[Array], weights: list[float], space: str, xp: Any) -> Array:
    """Averages equally shaped logits (..., C) with weights, as logits.

    `space` logits: sum of w z; probabilities: log of the sum of w softmax(z), which softmax turns
    into the mixture itself. `xp` is numpy or jax.numpy.
    """
    if len(logits) == 1:
        return logits[0]
    if space == "logits":
        return sum(w * z for w, z in zip(weights, logits, strict=True))
    if space != "probabilities":
        raise UserError(f"teachers are averaged in {space!r}: have {', '.join(SPACES)}")
    # In logarithms: padding of spans stays as hopeless as it is in each.
    pairs = zip(weights, logits, strict=True)
    logs = [math.log(w) + _log_softmax(z, xp) for w, z in pairs if w > 0]
    most = functools.reduce(xp.maximum, logs)
    return most + xp.log(sum(xp.exp(log - most) for log in logs))


def _log_softmax(logits: Array, xp: Any) -> Array:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - xp.log(xp.exp(shifted).sum(axis=-1, keepdims=True))
