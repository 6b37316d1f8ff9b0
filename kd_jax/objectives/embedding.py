"""Defines the term `embedding`: the student's vectors imitate the teacher's."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from kd_jax.objectives.vectors import VectorTerm, direction
from kd_jax.precision import HIGHEST
from kd_jax.ranges import Choice
from kd_jax.types import Array, ModelSpec, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Embedding(VectorTerm):
    """The distance of a student's vector s from the teacher's t, a mean over texts.

    mse: mean_d (P s - t)_d^2, in squared units of the vectors (for vectors of length 1 at most
    4 / D); cosine: 1 - cos(P s, t). Reimers and Gurevych, "Making Monolingual Sentence Embeddings
    Multilingual using Knowledge Distillation", arXiv:2004.09813, section 2.

    P is a learned linear map without bias, one for each size of the student's vectors that is not
    the teacher's, which only training needs. A narrower student's begins as the directions in which
    the teacher's vectors are longest (principal components, without a mean, since P adds none), a
    wider one's orthogonal. The former keeps the student's lengths and angles at first.
    """

    kind: str = "mse"

    name = "embedding"

    def __post_init__(self) -> None:
        super().__post_init__()
        Choice("mse", "cosine").check(self.kind, "objective embedding: kind")

    def init(self, key: Array, student: ModelSpec, teacher: ModelSpec) -> Params:
        """Draws the projections {size: {"kernel": (size, Dt)}}, orthogonal."""
        super().init(key, student, teacher)
        orthogonal, width = jax.nn.initializers.orthogonal(), teacher.vector_width
        sizes = [size for size in self.sizes(student.vector_width) if size != width]
        keys = jax.random.split(key, max(1, len(sizes)))
        kernels = (orthogonal(one, (size, width)) for one, size in zip(keys, sizes, strict=False))
        return {str(size): {"kernel": own} for size, own in zip(sizes, kernels, strict=True)}

    def fitted(self, params: Params, teacher_ND: Callable[[], np.ndarray]) -> Params:
        """Makes the projections of narrower vectors from the teacher's principal components."""
        narrower = [size for size, own in params.items() if int(size) < own["kernel"].shape[1]]
        if not narrower:
            return params
        vectors_ND = teacher_ND().astype(np.float64)
        _, directions_DD = np.linalg.eigh(vectors_ND.T @ vectors_ND)  # the longest ones come last
        directions_DD = directions_DD.T[::-1].astype(np.float32)
        return params | {size: {"kernel": directions_DD[: int(size)]} for size in narrower}

    def _values(self, params, ours_BD, theirs_BD, batch, temperature):
        if own := params.get(str(ours_BD.shape[1])):
            ours_BD = jnp.einsum("bs,sd->bd", ours_BD, own["kernel"], precision=HIGHEST)
        if self.kind == "mse":
            return jnp.mean(jnp.square(ours_BD - theirs_BD), axis=1)
        return 1.0 - jnp.sum(direction(ours_BD) * direction(theirs_BD), axis=1)


make = Embedding
