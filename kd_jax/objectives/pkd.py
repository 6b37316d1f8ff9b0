"""Defines the term `pkd`: the first token's states in the student's inner layers imitate the
teacher's.

Sun et al., "Patient Knowledge Distillation for BERT Model Compression", arXiv:1908.09355, eq. 7.
The equation sums over units and layers; means are taken here, as in the authors' code, so that
their weights (beta = 10 to 1000) carry over.
"""

import dataclasses

import jax
import jax.numpy as jnp

from kd_jax.errors import UserError
from kd_jax.objectives import layer_map as maps
from kd_jax.types import Array, Batch, ModelSpec, Params


def layer_pairs(layers: str | maps.Pairs, student: ModelSpec, teacher: ModelSpec) -> maps.Pairs:
    """Lists the (student, teacher) layers of the paper's two maps, or of pairs in the config.

    The student's last layer is left to the other terms. `skip` (PKD-Skip) is the uniform map
    without it: 12 to 6 layers are 2, 4, 6, 8, 10; `last` (PKD-Last) takes the teacher's last
    layers but one: 7 to 11. Raises UserError if the student has no such layers.
    """
    if layers not in ("skip", "last"):
        return maps.pairs("pkd", layers, student, teacher)
    if student.num_layers < 2 or student.num_layers > teacher.num_layers:
        raise UserError(
            f"objective pkd: layers={layers!r} wants a student of 2 to {teacher.num_layers} layers "
            f"(the teacher's), and it has {student.num_layers}: give pairs (student, teacher)"
        )
    if layers == "skip":
        return maps.pairs("pkd", "uniform", student, teacher)[:-1]
    above = teacher.num_layers - student.num_layers
    return tuple((i, above + i) for i in range(1, student.num_layers))


@dataclasses.dataclass(frozen=True)
class Patient(maps.LayerTerm):
    """The distance (h_s / |h_s| - h_t / |h_t|)^2, h the hidden state of token 0, a mean over rows,
    layer pairs and units; at most 4 / D."""

    layers: str | maps.Pairs

    name = "pkd"

    def pairs(self, student: ModelSpec, teacher: ModelSpec) -> maps.Pairs:
        """Lists the (student, teacher) layers to compare."""
        return layer_pairs(self.layers, student, teacher)

    def init(self, key: Array, student: ModelSpec, teacher: ModelSpec) -> Params:
        """Returns {}, no parameters; UserError if widths differ or a layer does not exist."""
        if student.width != teacher.width:
            raise UserError(
                f"objective pkd: the student is {student.width} wide and the teacher "
                f"{teacher.width}, and states are compared as they are: use objective.hidden, "
                "which projects"
            )
        return super().init(key, student, teacher)

    def weights(self, batch: Batch) -> Array:
        """Returns the weights of rows, (B,): 1 for rows that have a first token."""
        return batch.mask_BT[:, 0]

    def _distance(self, student: Array, teacher: Array, batch: Batch) -> Array:
        return jnp.mean(jnp.square(_direction(student) - _direction(teacher)), axis=-1)


def _direction(hidden_BTD: Array) -> Array:
    first_BD = hidden_BTD[:, 0].astype(jnp.float32)
    return first_BD * jax.lax.rsqrt(jnp.sum(first_BD**2, axis=-1, keepdims=True) + 1e-12)


def make(layers: str | maps.Pairs = "skip") -> Patient:
    """Makes the term; `layers`: skip | last (`layer_pairs`) | pairs (student, teacher), from 1."""
    return Patient(maps.read("pkd", layers, ("skip", "last")))
