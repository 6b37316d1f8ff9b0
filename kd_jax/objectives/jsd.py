"""Defines the term `jsd`: generalized Jensen-Shannon divergence, between forward and reverse KL.

Agarwal et al., "On-Policy Distillation of Language Models" (GKD), arXiv:2306.13649, eq. 1. As
published it vanishes at both ends of beta, where implementations jump to the two KLs; divided by
beta (1 - beta) it reaches them without a jump.
"""

import dataclasses

from kd_jax.objectives.divergence import Divergence, Softened
from kd_jax.objectives.kl import ForwardKL
from kd_jax.objectives.mixed import mixed
from kd_jax.objectives.reverse_kl import ReverseKL
from kd_jax.ranges import Real


@dataclasses.dataclass(frozen=True)
class JensenShannon(Softened):
    """Jensen-Shannon divergence T^2 [b KL(q || m) + (1 - b) KL(p || m)] / (b (1 - b)), where
    m = b q + (1 - b) p and 0 < b < 1."""

    beta: float = 0.5
    scaled: bool = True

    def _scale(self):
        return 1.0 / (self.beta * (1.0 - self.beta)) if self.scaled else 1.0

    def value(self, rows, sums, temperature):
        p_CV, q_CV = (model.probs(temperature, sums) for model in (rows.student, rows.teacher))
        of_p, of_q = mixed(p_CV, q_CV, self.beta), mixed(q_CV, p_CV, 1.0 - self.beta)
        both_CV = self.beta * of_q.kl() + (1.0 - self.beta) * of_p.kl()
        factor = self._scale() * self._factor(temperature)
        return factor * rows.total(both_CV)

    def grad(self, rows, sums, temperature):
        p_CV, q_CV = (model.probs(temperature, sums) for model in (rows.student, rows.teacher))
        of_p = mixed(p_CV, q_CV, self.beta)
        # d/dp of the bracket: (1 - b) log(p / m)
        slope_CV = -(1.0 - self.beta) * of_p.log_ratio()
        factor = self._scale() * self._slope(temperature)
        return factor * rows.through_softmax(of_p.own_CV, slope_CV)


def make(beta: float = 0.5, scaled: bool = True, t_squared: bool = True) -> Divergence:
    """Makes the term: `beta` 0 is forward KL, 1 reverse KL; with `scaled=False` as published."""
    Real(least=0, most=1).check(beta, "objective jsd: beta")
    if beta == 0.0:
        return ForwardKL(t_squared)
    if beta == 1.0:
        return ReverseKL(t_squared)
    return JensenShannon(t_squared, beta=beta, scaled=scaled)
