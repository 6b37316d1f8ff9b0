"""`reverse_kl`: KL(student || teacher), the mode-seeking direction.

Gu et al., "MiniLLM: Knowledge Distillation of Large Language Models", arXiv:2306.08543, eq. 1,
taken here token by token on the given text.
"""

import dataclasses

from kd_jax.objectives.divergence import Softened, gap_sum, key_of


@dataclasses.dataclass(frozen=True)
class ReverseKL(Softened):
    """T^2 sum_v p (log p - log q), p = softmax(student / T), q = softmax(teacher / T)."""

    def sums(self, rows, temperature):
        gap = gap_sum("reverse_kl", rows, rows.student, rows.teacher, temperature)
        return {**super().sums(rows, temperature), **gap}

    def _divergence(self, rows, sums, temperature):
        student, teacher = rows.student, rows.teacher
        mass_C1 = sums[student.name, key_of(temperature)]
        mean_gap_C1 = sums["reverse_kl", student.name, key_of(temperature)] / mass_C1 / temperature
        return (
            mean_gap_C1
            + teacher.log_normaliser(temperature, sums)
            - student.log_normaliser(temperature, sums)
        )

    def value(self, rows, sums, temperature):
        return self._factor(temperature) * self._divergence(rows, sums, temperature)

    def grad(self, rows, sums, temperature):
        student, teacher = rows.student, rows.teacher
        log_ratio_CV = student.log_probs(temperature, sums) - teacher.log_probs(temperature, sums)
        centred_CV = log_ratio_CV - self._divergence(rows, sums, temperature)
        return self._slope(temperature) * student.probs(temperature, sums) * centred_CV


make = ReverseKL
