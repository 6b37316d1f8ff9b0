"""Averages several teachers, each of which may read rows with a different tokenizer.

Logits and probabilities are different averages: the mean of logits is a geometric mean of the
distributions, which a confident teacher dominates; the mean of probabilities is their mixture (You
et al., "Learning from Multiple Teacher Networks", KDD 2017, averages softened ones).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax.numpy as jnp
from flax import nnx, struct

from kd_jax.errors import UserError
from kd_jax.types import Array, Batch, Model, ModelOutput, Params

SPACES = ("logits", "probabilities")


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
