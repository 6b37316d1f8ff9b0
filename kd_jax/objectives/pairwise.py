"""Computes scores for pairs of tokens (queries and keys) and their distances: base of the terms on
attention and relations.

Padding is neither a query nor a key, and a causal model's query has no later keys: means run over
the remaining keys, so that neither padding nor the mask changes a value.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kd_jax.errors import UserError
from kd_jax.objectives.layer_map import LayerTerm
from kd_jax.precision import HIGHEST
from kd_jax.types import Array, Batch, Heads, ModelOutput, ModelSpec, Params

_MASKED = -1e9


class Pairwise(LayerTerm):
    """Base of the terms that compare queries, keys and values, with their common settings."""

    causal: bool

    def _check(self, student: int, teacher: int) -> None:
        """Raises UserError if layers with these numbers of heads cannot be compared."""
        raise NotImplementedError

    def _compare(self, student: Heads, teacher: Heads, visible_B1TS: Array) -> Array:
        """Computes the distance of one pair of layers at each query, (B, T)."""
        raise NotImplementedError

    def init(self, key: Array, student: ModelSpec, teacher: ModelSpec) -> Params:
        """Returns {}, no parameters; UserError if layers or heads cannot be compared."""
        check_causal(self.name, self.causal, student, teacher)
        if student.num_heads and teacher.num_heads:
            self._check(student.num_heads, teacher.num_heads)
        return super().init(key, student, teacher)

    def _states(self, output: ModelOutput) -> Sequence[Heads | None]:
        return None, *output.attention

    def _distance(self, student: Heads, teacher: Heads, batch: Batch) -> Array:
        # Keys and values that heads share count for each of them.
        ours, theirs = student.spread(), teacher.spread()
        self._check(ours.q_BTHK.shape[2], theirs.q_BTHK.shape[2])
        return self._compare(ours, theirs, visible(batch.mask_BT, self.causal))


def check_causal(objective: str, causal: bool, student: ModelSpec, teacher: ModelSpec) -> None:
    """Raises UserError if the setting `causal` contradicts the models."""
    for whose, spec in (("student", student), ("teacher", teacher)):
        if spec.causal != causal:
            keys = "keys at or before it" if spec.causal else "all keys"
            raise UserError(
                f"objective {objective}: causal={causal}, but a query of the {whose} sees {keys}: "
                f"set causal={spec.causal}, or use models of one kind"
            )


def visible(mask_BT: Array, causal: bool) -> Array:
    """Tells which keys (axis 3) each query (axis 2) sees, without padding: bool (B, 1, T, T)."""
    real_BT = mask_BT > 0
    pairs_BTS = real_BT[:, :, None] & real_BT[:, None, :]
    if causal:
        pairs_BTS = jnp.tril(pairs_BTS)
    return pairs_BTS[:, None]


def scores(x_BTHK: Array, y_BTHK: Array) -> Array:
    """Computes the dot products of all x with all y, head by head: float32 (B, H, T, T)."""
    x_BTHK, y_BTHK = (array.astype(jnp.float32) for array in (x_BTHK, y_BTHK))
    return jnp.einsum("bthk,bshk->bhts", x_BTHK, y_BTHK, precision=HIGHEST)


def log_probs(scores_BHTS: Array, visible_B1TS: Array) -> Array:
    """Computes log softmax over the keys that each query sees, (B, H, T, T)."""
    return jax.nn.log_softmax(jnp.where(visible_B1TS, scores_BHTS, _MASKED), axis=-1)


def kl(ours_BHTS: Array, theirs_BHTS: Array, visible_B1TS: Array) -> Array:
    """Computes KL(theirs || ours) of log probabilities for each query, averaged over heads."""
    each_BHTS = jnp.exp(theirs_BHTS) * (theirs_BHTS - ours_BHTS)
    # Masked logarithms are so large that even two equal ones may differ by rounding.
    each_BHTS = jnp.where(visible_B1TS, each_BHTS, 0.0)
    return jnp.mean(jnp.sum(each_BHTS, axis=-1), axis=1)


def mse(ours_BHTS: Array, theirs_BHTS: Array, visible_B1TS: Array) -> Array:
    """Computes the mean squared difference over visible keys and heads, for each query, (B, T)."""
    gap_BHTS = jnp.where(visible_B1TS, ours_BHTS - theirs_BHTS, 0.0)
    keys_BT = jnp.maximum(jnp.sum(visible_B1TS[:, 0], axis=-1), 1)
    return jnp.mean(jnp.sum(jnp.square(gap_BHTS), axis=-1), axis=1) / keys_BT
