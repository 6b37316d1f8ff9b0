"""Defines teachers whose stored logits come with the batch (`Batch.stored`), and a teacher together
with the earlier members of an ensemble, with which the student is averaged.

Members of one shape are stacked and run as one model under `vmap`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jax.sharding import PartitionSpec as P

from kd_jax.models import family
from kd_jax.objectives.logits import Members, Others, Targets, head_of, stored
from kd_jax.types import Array, Batch, Model, ModelOutput, Params

TEACHER, OTHERS = "teacher", "others"  # keys of `Batch.stored`
# Where the parameters of `EnsembleTeacher` lie: those of stacked members as one member's, behind E.
PARTITION = (
    *((f"^members/.*{pattern}", P(None, *spec)) for pattern, spec in family.PARTITION),
    ("^(share|weights)$", P()),
    *family.PARTITION,
)


class Stored(struct.PyTreeNode):
    """A teacher whose stored logits come with the batch: all of them, or the largest of
    `num_classes`."""

    num_classes: int = struct.field(pytree_node=False)
    params: Params = struct.field(default_factory=dict)

    def __call__(self, batch: Batch) -> ModelOutput | Targets:
        """Returns the stored logits for every label of the batch."""
        logits = batch.stored[TEACHER]
        if logits.ids_BPK is None:
            return ModelOutput(logits.values_BPK, None, None)
        return Targets(stored(logits, self.num_classes), None)


class EnsembleTeacher(struct.PyTreeNode):
    """A teacher together with the earlier members of an ensemble that the student joins.

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
    heads = jax.vmap(lambda params: head_of(Model(params, graphdef)(batch)))(params)
    return Members(heads, weights_E, space)


def stack(models: list[Params]) -> Params:
    """Stacks parameters of models of one shape, E on the first axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *models)
