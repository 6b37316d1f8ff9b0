"""Defines the term `contrastive`: an anchor finds its positive among the texts of a batch; no
teacher is needed."""

import dataclasses

import jax
import jax.numpy as jnp

from kd_jax import axes
from kd_jax.objectives.vectors import ANCHOR, POSITIVE, ScoreTerm, of_all
from kd_jax.types import Array, Batch

_MASKED = -1e9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contrastive(ScoreTerm):
    """InfoNCE, -log softmax(s / T) at the positive, in nats, a mean over anchors: s are the scores
    of an anchor with the positives and given negatives of all examples of the global batch.

    `symmetric`: the mean of this and of the same from a positive to all anchors. T is the
    `temperature`; 0.05 is a scale of 20 in other libraries. A text that stands in a batch more than
    once is no negative of itself or its partner. van den Oord et al., "Representation Learning with
    Contrastive Predictive Coding", arXiv:1807.03748, eq. 4.
    """

    symmetric: bool = False

    name, texts = "contrastive", 2
    needs_teacher = False
    compares_rows = has_temperature = True

    def weights(self, batch: Batch) -> Array:
        """Returns the weights of rows, (B,): 0 but for anchors; if symmetric, half for an anchor
        and half for its positive."""
        roles_B, weights_B = batch.labels[:, 0], batch.weights[:, 0]
        if self.symmetric:
            return 0.5 * weights_B * (roles_B <= POSITIVE)
        return weights_B * (roles_B == ANCHOR)

    def _values(self, params, ours_BD, theirs_BD, batch, temperature):
        roles_B1, roles_1N = of_all(batch.labels[:, 0])
        ids_B1, ids_1N = of_all(batch.ids_B)
        _, real_1N = of_all(batch.weights[:, 0] > 0)
        examples_N = jnp.cumsum(roles_1N[0] == ANCHOR)
        same_BN = axes.own(examples_N, axes.ROWS)[:, None] == examples_N[None]
        # Anchors look for positives among all but anchors, and the other way round.
        right_BN = same_BN & (roles_B1 + roles_1N == ANCHOR + POSITIVE)
        right_B1 = jnp.max(jnp.where(right_BN, ids_1N, -1), axis=1, keepdims=True)
        other_BN = (ids_1N != ids_B1) & (ids_1N != right_B1)
        other_BN &= (roles_B1 == ANCHOR) != (roles_1N == ANCHOR)
        seen_BN = right_BN | (real_1N & other_BN)
        scores_BN = self.with_all(ours_BD) / temperature
        best_B = jnp.sum(jnp.where(right_BN, scores_BN, 0.0), axis=1)
        scores_BN = jnp.where(seen_BN, scores_BN, _MASKED)
        return jax.nn.logsumexp(scores_BN, axis=1) - best_B


make = Contrastive
