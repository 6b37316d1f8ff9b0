"""Defines the term `margin_mse`: the student prefers a positive to a negative by as much as the
teacher."""

import dataclasses

import jax.numpy as jnp

from kd_jax.objectives.vectors import ANCHOR, NEGATIVE, POSITIVE, ScoreTerm
from kd_jax.types import Array, Batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class MarginMSE(ScoreTerm):
    """((s(q, p) - s(q, n)) - (t(q, p) - t(q, n)))^2 in squared scores, a mean over the given
    negatives n of all examples with anchor q and positive p; s and t are the scores of student and
    teacher. Hofstaetter et al., "Improving Efficient Neural Ranking Models with Cross-Architecture
    Knowledge Distillation", arXiv:2010.02666, section 3.
    """

    score: str = "dot"

    name, texts = "margin_mse", 3

    def weights(self, batch: Batch) -> Array:
        """Returns the weights of rows, (B,): 0 but for negatives."""
        return batch.weights[:, 0] * (batch.labels[:, 0] >= NEGATIVE)

    def _margins(self, x_BD: Array, batch: Batch) -> Array:
        """Computes by how much the positive's score is above that of each row, (B,)."""
        x_BD, first_B = self.ready(x_BD), jnp.arange(len(x_BD)) - batch.labels[:, 0]
        anchors_BD, positives_BD = (x_BD[first_B + role] for role in (ANCHOR, POSITIVE))
        return jnp.sum(anchors_BD * (positives_BD - x_BD), axis=1)

    def _values(self, params, ours_BD, theirs_BD, batch, temperature):
        return jnp.square(self._margins(ours_BD, batch) - self._margins(theirs_BD, batch))


make = MarginMSE
