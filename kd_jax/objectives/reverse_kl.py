"""Defines the term `reverse_kl`: KL(student || teacher), the mode-seeking direction.

Gu et al., "MiniLLM: Knowledge Distillation of Large Language Models", arXiv:2306.08543, eq. 1,
taken here token by token on the given text.
"""

import dataclasses

from kd_jax.objectives.divergence import Softened


@dataclasses.dataclass(frozen=True)
class ReverseKL(Softened):
    """Reverse KL, T^2 sum_v p (log p - log q): p = softmax(student / T), q = softmax(teacher / T).
    Its gradient is written out."""

    needs_all_ids = True

    def sums(self, rows, temperature):
        return super().sums(rows, temperature) | rows.student.gap(rows.teacher, temperature)

    def value(self, rows, sums, temperature):
        return self._factor(temperature) * rows.student.kl(rows.teacher, temperature, sums)

    def grad(self, rows, sums, temperature):
        student, teacher = rows.student, rows.teacher
        # Of log(p / q) - KL the normalizers cancel; they would only round it.
        gap_CV = (student.shifted_CV - teacher.shifted_CV) / temperature
        centered_CV = gap_CV - student.mean_gap(teacher, temperature, sums)
        return self._slope(temperature) * student.probs(temperature, sums) * centered_CV


make = ReverseKL
