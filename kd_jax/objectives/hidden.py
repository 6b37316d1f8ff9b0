"""`hidden`: the student's hidden states follow the teacher's, layer by layer.

MSE: Jiao et al., "TinyBERT", arXiv:1909.10351, eq. 8. Cosine: Sanh et al., "DistilBERT",
arXiv:1910.01108, section 2. Padding is left out of both.
"""

import dataclasses
import operator

import jax
import jax.numpy as jnp

from kd_jax.errors import UserError
from kd_jax.types import Array, Batch, ModelOutput, ModelSpec, Params

Pairs = tuple[tuple[int, int], ...]


def layer_pairs(layers: str | Pairs, student: ModelSpec, teacher: ModelSpec) -> Pairs:
    """(student, teacher) indices into the hidden states, 0 being the embeddings.

    `uniform` spreads the student's layers over the teacher's: i goes with round(i Lt / Ls);
    `last` takes the last of each; else the pairs as given.
    """
    if layers == "last":
        return ((student.num_layers, teacher.num_layers),)
    if layers == "uniform":
        ratio = teacher.num_layers / student.num_layers
        return tuple((i, round(i * ratio)) for i in range(1, student.num_layers + 1))
    for s, t in layers:
        if not (0 <= s <= student.num_layers and 0 <= t <= teacher.num_layers):
            raise UserError(
                f"objective hidden: layers: ({s}, {t}) is no pair of hidden states (student 0 to "
                f"{student.num_layers}, teacher 0 to {teacher.num_layers})"
            )
    return layers


@dataclasses.dataclass(frozen=True)
class Hidden:
    """Mean over the pairs and over all tokens but padding.

    mse: mean_d (P h_s - h_t)^2, in squared hidden units; cosine: 1 - cos(P h_s, h_t). P is a
    learned linear map without bias, one a pair, present only where the widths differ.
    """

    kind: str
    layers: str | Pairs

    needs_teacher = True
    positions = "all"

    def init(self, key: Array, student: ModelSpec, teacher: ModelSpec) -> Params:
        """Projections {"pair_i": kernel (Ds, Dt)}, Glorot uniform; {} where widths agree."""
        pairs = layer_pairs(self.layers, student, teacher)
        if student.width == teacher.width:
            return {}
        keys = jax.random.split(key, len(pairs))
        glorot = jax.nn.initializers.glorot_uniform()
        shape = (student.width, teacher.width)
        return {f"pair_{i}": {"kernel": glorot(keys[i], shape)} for i in range(len(pairs))}

    def weights(self, batch: Batch) -> Array:
        """The tokens that count, (B, T)."""
        return batch.mask_BT

    def total(
        self, params: Params, student: ModelOutput, teacher: ModelOutput, batch: Batch
    ) -> Array:
        """The weighted sum over this batch's tokens, a float32 scalar."""
        specs = [
            ModelSpec(out.hidden[0].shape[-1], len(out.hidden) - 1) for out in (student, teacher)
        ]
        pairs = layer_pairs(self.layers, *specs)
        rows_BT = jnp.zeros(batch.mask_BT.shape, jnp.float32)
        for i, (s, t) in enumerate(pairs):
            ours_BTD = student.hidden[s].astype(jnp.float32)
            theirs_BTD = teacher.hidden[t].astype(jnp.float32)
            if params:
                ours_BTD = jnp.einsum("bts,sd->btd", ours_BTD, params[f"pair_{i}"]["kernel"])
            rows_BT += self._distance(ours_BTD, theirs_BTD)
        return jnp.sum(rows_BT * batch.mask_BT) / len(pairs)

    def _distance(self, ours_BTD: Array, theirs_BTD: Array) -> Array:
        if self.kind == "mse":
            return jnp.mean(jnp.square(ours_BTD - theirs_BTD), axis=-1)
        dot_BT = jnp.sum(ours_BTD * theirs_BTD, axis=-1)
        squares_BT = jnp.sum(ours_BTD**2, axis=-1) * jnp.sum(theirs_BTD**2, axis=-1)
        return 1.0 - dot_BT * jax.lax.rsqrt(squares_BT + 1e-12)


def make(kind: str = "mse", layers: str | Pairs = "uniform") -> Hidden:
    """`kind`: mse | cosine; `layers`: uniform | last | pairs (student, teacher)."""
    if kind not in ("mse", "cosine"):
        raise UserError(f"objective hidden: kind={kind!r}: have cosine, mse")
    if layers not in ("uniform", "last"):
        try:
            layers = tuple((operator.index(s), operator.index(t)) for s, t in layers)
        except (TypeError, ValueError):
            raise UserError(
                f"objective hidden: layers={layers!r}: have uniform, last, or pairs (student, "
                "teacher)"
            ) from None
    if not layers:
        raise UserError("objective hidden: layers is empty: give at least one pair")
    return Hidden(kind, layers)
