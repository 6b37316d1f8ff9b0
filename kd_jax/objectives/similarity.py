"""Defines the term `similarity`: the student finds the same texts of a batch near each other as the
teacher."""

import dataclasses

import jax
import jax.numpy as jnp

from kd_jax import axes
from kd_jax.objectives.vectors import ScoreTerm, of_all
from kd_jax.ranges import Real
from kd_jax.types import Array

_MASKED = -1e9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Similarity(ScoreTerm):
    """T^2 KL(softmax(t / T_t) || softmax(s / T)) in nats, a mean over texts: t and s are the scores
    of a text with all others of the global batch, in the teacher and in the student.

    The temperature T is the student's, T_t = `teacher_temperature` the teacher's (None: the same);
    `t_squared=False` leaves the factor T^2 out. Vectors may have any widths. Lin et al.,
    "Distilling Dense Representations for Ranking using Tightly-Coupled Teachers", arXiv:2010.11386,
    with the temperatures of sentence-transformers' DistillKLDivLoss.
    """

    teacher_temperature: float | None = None
    t_squared: bool = True

    name = "similarity"
    compares_rows = has_temperature = True

    def __post_init__(self) -> None:
        super().__post_init__()
        within = Real(least=0.01, most=100, default=None)
        key = "objective similarity: teacher_temperature"
        within.check(self.teacher_temperature, key)

    def _values(self, params, ours_BD, theirs_BD, batch, temperature):
        _, real_1N = of_all(batch.weights[:, 0] > 0)
        numbers_N = jnp.arange(real_1N.shape[1])
        own_B = axes.own(numbers_N, axes.ROWS)
        others_BN = real_1N & (numbers_N[None] != own_B[:, None])

        def log_probs(x_BD: Array, temperature: Array | float) -> Array:
            scores_BN = self.with_all(x_BD) / temperature
            return jax.nn.log_softmax(jnp.where(others_BN, scores_BN, _MASKED), axis=1)

        ours_BN = log_probs(ours_BD, temperature)
        theirs_BN = log_probs(theirs_BD, self.teacher_temperature or temperature)
        each_BN = jnp.where(others_BN, jnp.exp(theirs_BN) * (theirs_BN - ours_BN), 0.0)
        return jnp.sum(each_BN, axis=1) * (temperature**2 if self.t_squared else 1.0)


make = Similarity
