"""Defines the term `tvd`: total variation distance between teacher and student.

Wen et al., "f-Divergence Minimization for Sequence-Level Knowledge Distillation",
arXiv:2307.15190, table 1.
"""

import dataclasses

import jax.numpy as jnp

from kd_jax.objectives.divergence import Softened


@dataclasses.dataclass(frozen=True)
class TotalVariation(Softened):
    """Total variation, T^2 / 2 sum_v |p - q|: bounded, so outlier tokens cannot dominate."""

    def value(self, rows, sums, temperature):
        p_CV = rows.student.probs(temperature, sums)
        q_CV = rows.teacher.probs(temperature, sums)
        return 0.5 * self._factor(temperature) * rows.total(jnp.abs(p_CV - q_CV))

    def grad(self, rows, sums, temperature):
        p_CV = rows.student.probs(temperature, sums)
        gap_CV = p_CV - rows.teacher.probs(temperature, sums)
        # Where the two agree, rounding must not choose a slope of -1 or 1.
        sign_CV = jnp.where(jnp.abs(gap_CV) > 1e-5 * p_CV, jnp.sign(gap_CV), 0.0)
        mean_C1 = rows.total(p_CV * sign_CV)
        return 0.5 * self._slope(temperature) * p_CV * (sign_CV - mean_C1)


make = TotalVariation
