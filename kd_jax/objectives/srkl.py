"""Defines the term `srkl`: skew reverse KL divergence of the student from a mixture of both models.

Ko et al., "DistiLLM: Towards Streamlined Distillation for Large Language Models",
arXiv:2402.03898, section 3.1, where alpha is 0.1.
"""

import dataclasses

from kd_jax.objectives.divergence import Divergence, Softened
from kd_jax.objectives.mixed import mixed
from kd_jax.objectives.reverse_kl import ReverseKL
from kd_jax.objectives.skl import ALPHA


@dataclasses.dataclass(frozen=True)
class SkewReverseKL(Softened):
    """Skew reverse KL, T^2 KL(p || (1 - a) q + a p), 0 < a < 1: p of the student, q of the
    teacher."""

    alpha: float = 0.1

    def _student(self, rows, sums, temperature):
        p_CV, q_CV = (model.probs(temperature, sums) for model in (rows.student, rows.teacher))
        return mixed(p_CV, q_CV, 1.0 - self.alpha)

    def value(self, rows, sums, temperature):
        of_p = self._student(rows, sums, temperature)
        return self._factor(temperature) * rows.total(of_p.kl())

    def grad(self, rows, sums, temperature):
        of_p = self._student(rows, sums, temperature)
        # d/dp: log(p / m) - a p / m, plus a constant that makes it 0 for equal models.
        slope_CV = self.alpha * of_p.shortfall() - of_p.log_ratio()
        return self._slope(temperature) * rows.through_softmax(of_p.own_CV, slope_CV)


def make(alpha: float = 0.1, t_squared: bool = True) -> Divergence:
    """Makes the term: `alpha` is the student's share of the mixture; 0 is reverse KL."""
    ALPHA.check(alpha, "objective srkl: alpha")
    return SkewReverseKL(t_squared, alpha=alpha) if alpha else ReverseKL(t_squared)
