"""Defines the base of the terms that compare vectors of texts, those of sentence embedders.

A row of a batch is one text. Its label is its role in its example: 0 the anchor (a query, or a lone
text), 1 the anchor's positive, 2, 3, ... its given negatives. The texts of an example stand
together in this order, on one device and in one micro-batch. Rows that fill a batch up have weight
0.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kd_jax import axes
from kd_jax.errors import UserError
from kd_jax.precision import HIGHEST
from kd_jax.ranges import Choice, Real, Whole
from kd_jax.types import Array, Batch, ModelOutput, ModelSpec, Params

ANCHOR, POSITIVE, NEGATIVE = 0, 1, 2  # roles; further negatives have larger numbers


@dataclasses.dataclass(frozen=True, kw_only=True)
class VectorTerm:
    """Base of the terms over vectors: frozen dataclasses whose fields are their settings.

    With `dims` a term is the sum of what it is for the student's vectors cut to their first so many
    numbers, each weighted by its entry in `dim_weights` (by default 1), so that short vectors serve
    as well as whole ones; the teacher's stay whole. Kusupati et al., "Matryoshka Representation
    Learning", arXiv:2205.13147, eq. 1. Without `dims` vectors are compared whole.

    Terms that compare a text with other examples' (`compares_rows`) have no parameters: they see
    the texts of all devices and micro-batches at once (train/step.py).
    """

    dims: tuple[int, ...] = ()
    dim_weights: tuple[float, ...] = ()

    name = ""  # of the plug-in, for messages
    needs_teacher = True
    compares_rows = False
    has_temperature = False
    usual_temperature = 0.05
    texts = 1  # the fewest texts of an example with which the term means something

    def __post_init__(self) -> None:
        for key, number in (("dims", Whole(least=1)), ("dim_weights", Real(least=0))):
            own = _numbers(getattr(self, key), number, f"objective {self.name}: {key}")
            object.__setattr__(self, key, own)
        if self.dim_weights and len(self.dim_weights) != len(self.dims):
            raise UserError(
                f"objective {self.name}: dim_weights has {len(self.dim_weights)} numbers and dims "
                f"{len(self.dims)}: give one for each, or leave dim_weights out"
            )

    def sizes(self, width: int) -> tuple[int, ...]:
        """Lists the sizes to which the student's vectors, `width` numbers, are cut."""
        return self.dims or (width,)

    def init(self, key: Array, student: ModelSpec, teacher: ModelSpec | None) -> Params:
        """Draws the term's own parameters, {} for most terms; raises UserError if the student's
        vectors are shorter than `dims` say."""
        if max(self.dims, default=0) > student.vector_width:
            raise UserError(
                f"objective {self.name}: dims={self.dims}: the student's vectors have "
                f"{student.vector_width} numbers; leave out what is larger"
            )
        return {}

    def fitted(self, params: Params, teacher_ND: Callable[[], np.ndarray]) -> Params:
        """Fits the term's own parameters, before the first step, to vectors of the teacher, which
        `teacher_ND` computes; most terms have nothing to fit."""
        return params

    def weights(self, batch: Batch) -> Array:
        """Returns the weights of rows, (B,)."""
        return batch.weights[:, 0]

    def total(
        self,
        params: Params,
        student: ModelOutput,
        teacher: ModelOutput | None,
        batch: Batch,
        temperature: Array | None = None,
    ) -> Array:
        """Computes the weighted sum over this device's rows, a float32 scalar; inside shard_map.
        `temperature`: a float32 scalar, for terms that have one."""
        real_B1 = batch.weights > 0
        # What fills a batch up may hold anything.
        cleared = lambda out: jnp.where(real_B1, out.features[:, 0].astype(jnp.float32), 0.0)  # noqa: E731
        ours_BD = cleared(student)
        theirs_BD = None if teacher is None else jax.lax.stop_gradient(cleared(teacher))
        weights_B, total = self.weights(batch), jnp.float32(0.0)
        sizes = self.sizes(ours_BD.shape[1])
        for size, factor in zip(sizes, self.dim_weights or (1.0,) * len(sizes), strict=True):
            values_B = self._values(params, ours_BD[:, :size], theirs_BD, batch, temperature)
            total += factor * jnp.sum(weights_B * values_B)
        return total

    def _values(
        self,
        params: Params,
        ours_BD: Array,
        theirs_BD: Array | None,
        batch: Batch,
        temperature: Array | None,
    ) -> Array:
        """Computes the value of each row, (B,), finite for all of them."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreTerm(VectorTerm):
    """Base of the terms over scores of pairs of texts: `score` is the dot product of their vectors,
    or the cosine."""

    score: str = "cosine"

    def __post_init__(self) -> None:
        super().__post_init__()
        Choice("cosine", "dot").check(self.score, f"objective {self.name}: score")

    def ready(self, x_BD: Array) -> Array:
        """Makes vectors whose dot products are the scores."""
        return direction(x_BD) if self.score == "cosine" else x_BD

    def with_all(self, x_BD: Array) -> Array:
        """Computes the scores of this device's texts with the texts of all devices, (B, N)."""
        own_BD = self.ready(x_BD)
        all_ND = axes.gathered(own_BD, axes.ROWS)
        return jnp.einsum("bd,nd->bn", own_BD, all_ND, precision=HIGHEST)


def direction(x_BD: Array) -> Array:
    """Divides vectors by their L2 norms; zeros stay."""
    return x_BD * jax.lax.rsqrt(jnp.sum(x_BD * x_BD, axis=-1, keepdims=True) + 1e-12)


def of_all(x_B: Array) -> tuple[Array, Array]:
    """Returns a number of this device's rows as a column, (B, 1), and that of the rows of all
    devices as a row, (1, N)."""
    return x_B[:, None], axes.gathered(x_B, axes.ROWS)[None]


def _numbers(values: Any, number: Real, key: str) -> tuple:
    if not isinstance(values, Iterable) or isinstance(values, str):
        raise UserError(f"{key}={values!r}: give a list of numbers")
    return tuple(number.check(each, key) for each in values)
