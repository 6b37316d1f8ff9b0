"""Defines the term `skl`: skew KL divergence of the teacher from a mixture of both models.

Ko et al., "DistiLLM: Towards Streamlined Distillation for Large Language Models",
arXiv:2402.03898, section 3.1, where alpha is 0.1. The mixture bounds both value and gradient where
the student gives an id of the teacher nearly no probability.
"""

import dataclasses

from kd_jax.objectives.divergence import Divergence, Softened
from kd_jax.objectives.kl import ForwardKL
from kd_jax.objectives.mixed import mixed
from kd_jax.ranges import Real

ALPHA = Real(least=0, below=1)


@dataclasses.dataclass(frozen=True)
class SkewKL(Softened):
    """Skew KL, T^2 KL(q || a q + (1 - a) p), 0 < a < 1: p of the student, q of the teacher."""

    alpha: float = 0.1

    def _teacher(self, rows, sums, temperature):
        p_CV, q_CV = (model.probs(temperature, sums) for model in (rows.student, rows.teacher))
        return p_CV, mixed(q_CV, p_CV, 1.0 - self.alpha)

    def value(self, rows, sums, temperature):
        _, of_q = self._teacher(rows, sums, temperature)
        return self._factor(temperature) * rows.total(of_q.kl())

    def grad(self, rows, sums, temperature):
        p_CV, of_q = self._teacher(rows, sums, temperature)
        # d/dp: -(1 - a) q / m, plus a constant that makes it 0 for equal models.
        slope_CV = (1.0 - self.alpha) * of_q.shortfall()
        return self._slope(temperature) * rows.through_softmax(p_CV, slope_CV)


def make(alpha: float = 0.1, t_squared: bool = True) -> Divergence:
    """Makes the term: `alpha` is the teacher's share of the mixture; 0 is forward KL."""
    ALPHA.check(alpha, "objective skl: alpha")
    return SkewKL(t_squared, alpha=alpha) if alpha else ForwardKL(t_squared)
