"""Defines the term `jsd`: generalized Jensen-Shannon divergence, between forward and reverse KL.

Agarwal et al., "On-Policy Distillation of Language Models" (GKD), arXiv:2306.13649, eq. 1. As
published it vanishes at both ends of beta, where implementations jump to the two KLs; divided by
beta (1 - beta) it reaches them without a jump.
"""

import dataclasses

import jax.numpy as jnp

from kd_jax.objectives.divergence import Divergence, Softened
from kd_jax.objectives.kl import ForwardKL
from kd_jax.objectives.reverse_kl import ReverseKL
from kd_jax.ranges import Real


def _log(ratio, u):
    """Computes log(ratio), where ratio = 1 + u, from whichever argument is more exact."""
    return jnp.where(u < -0.5, jnp.log(ratio), jnp.log1p(u))


def _excess(ratio, u):
    """Computes u - log(1 + u), exactly where the two nearly cancel."""
    series = u * u * (0.5 - u * (1.0 / 3.0 - u * (0.25 - u * 0.2)))
    return jnp.where(jnp.abs(u) < 0.03, series, u - _log(ratio, u))


@dataclasses.dataclass(frozen=True)
class JensenShannon(Softened):
    """Jensen-Shannon divergence T^2 [b KL(q || m) + (1 - b) KL(p || m)] / (b (1 - b)), where
    m = b q + (1 - b) p and 0 < b < 1."""

    beta: float = 0.5
    scaled: bool = True

    def _mixture(self, rows, sums, temperature):
        """Computes p, q, and the mixture m relative to each: (m / p, m / p - 1), (m / q, ...)."""
        tiny, b = jnp.finfo(jnp.float32).tiny, self.beta
        p_CV = jnp.maximum(rows.student.probs(temperature, sums), tiny)
        q_CV = jnp.maximum(rows.teacher.probs(temperature, sums), tiny)
        over_p = (1.0 - b) + b * (q_CV / p_CV), b * (q_CV - p_CV) / p_CV
        over_q = b + (1.0 - b) * (p_CV / q_CV), (1.0 - b) * (p_CV - q_CV) / q_CV
        return p_CV, q_CV, over_p, over_q

    def _scale(self):
        return 1.0 / (self.beta * (1.0 - self.beta)) if self.scaled else 1.0

    def value(self, rows, sums, temperature):
        p_CV, q_CV, over_p, over_q = self._mixture(rows, sums, temperature)
        # KL(p || m) = sum p (u - log(1 + u)), m = p (1 + u): every summand is positive.
        of_q_CV, of_p_CV = q_CV * _excess(*over_q), p_CV * _excess(*over_p)
        mix_CV = self.beta * of_q_CV + (1.0 - self.beta) * of_p_CV
        factor = self._scale() * self._factor(temperature)
        return factor * rows.total(mix_CV)

    def grad(self, rows, sums, temperature):
        p_CV, _, over_p, _ = self._mixture(rows, sums, temperature)
        slope_CV = -(1.0 - self.beta) * _log(*over_p)  # d/dp of the bracket: (1-b) log(p/m)
        mean_C1 = rows.total(p_CV * slope_CV)
        factor = self._scale() * self._slope(temperature)
        return factor * p_CV * (slope_CV - mean_C1)


def make(beta: float = 0.5, scaled: bool = True, t_squared: bool = True) -> Divergence:
    """Makes the term: `beta` 0 is forward KL, 1 reverse KL; with `scaled=False` as published."""
    Real(least=0, most=1).check(beta, "objective jsd: beta")
    if beta == 0.0:
        return ForwardKL(t_squared)
    if beta == 1.0:
        return ReverseKL(t_squared)
    return JensenShannon(t_squared, beta=beta, scaled=scaled)
