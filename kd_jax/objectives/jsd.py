"""`jsd`: generalised Jensen-Shannon divergence, between forward and reverse KL.

Agarwal et al., "On-Policy Distillation of Language Models" (GKD), arXiv:2306.13649, eq. 1. As
published it vanishes at both ends of beta, where implementations jump to the two KLs; divided by
beta (1 - beta) it reaches them without a jump.
"""

import dataclasses

import jax.numpy as jnp

from kd_jax.errors import UserError
from kd_jax.objectives.kl import ForwardKL
from kd_jax.objectives.reverse_kl import ReverseKL
from kd_jax.objectives.rows import Divergence


def _excess(u):
    """u - log(1 + u) for u >= -1, exact where the two nearly cancel."""
    series = u * u * (0.5 - u * (1.0 / 3.0 - u * (0.25 - u * 0.2)))
    return jnp.where(jnp.abs(u) < 0.03, series, u - jnp.log1p(u))


@dataclasses.dataclass(frozen=True)
class JensenShannon(Divergence):
    """T^2 [b KL(q || m) + (1 - b) KL(p || m)] / (b (1 - b)), m = b q + (1 - b) p, 0 < b < 1."""

    beta: float = 0.5
    scaled: bool = True
    t_squared: bool = True

    def sums(self, rows, temperature):
        return {**rows.student.normaliser(temperature), **rows.teacher.normaliser(temperature)}

    def _mixture(self, rows, sums, temperature):
        """p, q and the relative distance of the mixture from each: m = p (1 + u) = q (1 + w)."""
        tiny = jnp.finfo(jnp.float32).tiny
        p_CV = jnp.maximum(rows.student.probs(temperature, sums), tiny)
        q_CV = jnp.maximum(rows.teacher.probs(temperature, sums), tiny)
        u_CV = self.beta * (q_CV - p_CV) / p_CV
        w_CV = (1.0 - self.beta) * (p_CV - q_CV) / q_CV
        return p_CV, q_CV, u_CV, w_CV

    def _factor(self, power_of_t):
        scale = 1.0 / (self.beta * (1.0 - self.beta)) if self.scaled else 1.0
        return scale * power_of_t

    def value(self, rows, sums, temperature):
        p_CV, q_CV, u_CV, w_CV = self._mixture(rows, sums, temperature)
        # KL(p || m) = sum p (u - log(1 + u)): every summand is positive, nothing cancels.
        mix_CV = self.beta * q_CV * _excess(w_CV) + (1.0 - self.beta) * p_CV * _excess(u_CV)
        factor = self._factor(temperature**2 if self.t_squared else 1.0)
        return factor * jnp.sum(mix_CV, axis=1, keepdims=True)

    def grad(self, rows, sums, temperature):
        p_CV, _, u_CV, _ = self._mixture(rows, sums, temperature)
        slope_CV = -(1.0 - self.beta) * jnp.log1p(u_CV)  # d/dp of the bracket: (1-b) log(p/m)
        mean_C1 = jnp.sum(p_CV * slope_CV, axis=1, keepdims=True)
        factor = self._factor(temperature if self.t_squared else 1.0 / temperature)
        return factor * p_CV * (slope_CV - mean_C1)


def make(beta: float = 0.5, scaled: bool = True, t_squared: bool = True) -> Divergence:
    """`beta` 0 is forward KL, 1 is reverse KL; `scaled=False` gives the published values."""
    if not 0.0 <= beta <= 1.0:
        raise UserError(f"objective jsd: beta={beta} must lie in [0, 1]")
    if beta == 0.0:
        return ForwardKL(t_squared)
    if beta == 1.0:
        return ReverseKL(t_squared)
    return JensenShannon(beta, scaled, t_squared)
