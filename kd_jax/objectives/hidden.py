"""Defines the term `hidden`: the student's hidden states imitate the teacher's, layer by layer.

MSE: Jiao et al., "TinyBERT", arXiv:1909.10351, eq. 8. Cosine: Sanh et al., "DistilBERT",
arXiv:1910.01108, section 2. Padding is left out of both.
"""

import dataclasses

import jax
import jax.numpy as jnp

from kd_jax.errors import UserError
from kd_jax.objectives import layer_map as maps
from kd_jax.precision import HIGHEST
from kd_jax.types import Array, Batch, ModelSpec, Params


@dataclasses.dataclass(frozen=True)
class Hidden(maps.LayerTerm):
    """The distance of hidden states, a mean over layer pairs and tokens (not padding).

    mse: mean_d (P h_s - h_t)^2, in squared hidden units; cosine: 1 - cos(P h_s, h_t). P is a
    learned linear map without bias, one for each pair or one for all, only if the widths differ.
    """

    kind: str
    layers: str | maps.Pairs
    shared_projection: bool

    name, first = "hidden", 0

    def _projection(self, number: int) -> str:
        return "shared" if self.shared_projection else f"pair_{number}"

    def init(self, key: Array, student: ModelSpec, teacher: ModelSpec) -> Params:
        """Draws projections {"pair_i" or "shared": {"kernel": (Ds, Dt)}}, Glorot uniform; {} if the
        widths agree."""
        pairs = self.pairs(student, teacher)
        if student.width == teacher.width:
            return {}
        count = 1 if self.shared_projection else len(pairs)
        keys = jax.random.split(key, count)
        glorot = jax.nn.initializers.glorot_uniform()
        shape = (student.width, teacher.width)
        return {self._projection(i): {"kernel": glorot(keys[i], shape)} for i in range(count)}

    def _projected(self, params: Params, number: int, states: Array) -> Array:
        ours_BTD = states.astype(jnp.float32)
        if not params:
            return ours_BTD
        kernel = params[self._projection(number)]["kernel"]
        return jnp.einsum("bts,sd->btd", ours_BTD, kernel, precision=HIGHEST)

    def _distance(self, student: Array, teacher: Array, batch: Batch) -> Array:
        ours_BTD, theirs_BTD = student, teacher.astype(jnp.float32)
        if self.kind == "mse":
            return jnp.mean(jnp.square(ours_BTD - theirs_BTD), axis=-1)
        dot_BT = jnp.sum(ours_BTD * theirs_BTD, axis=-1)
        squares_BT = jnp.sum(ours_BTD**2, axis=-1) * jnp.sum(theirs_BTD**2, axis=-1)
        return 1.0 - dot_BT * jax.lax.rsqrt(squares_BT + 1e-12)


def make(
    kind: str = "mse", layers: str | maps.Pairs = "uniform", shared_projection: bool = False
) -> Hidden:
    """Makes the term. `kind`: mse | cosine; `layers`: uniform | last | pairs (student, teacher), 0
    being the embeddings; `shared_projection`: one P for all pairs, as in TinyBERT."""
    if kind not in ("mse", "cosine"):
        raise UserError(f"objective hidden: kind={kind!r}: have cosine, mse")
    return Hidden(kind, maps.read("hidden", layers), shared_projection)
