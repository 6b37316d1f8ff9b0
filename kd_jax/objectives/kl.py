"""`kl`: forward Kullback-Leibler divergence KL(teacher || student) of softened distributions.

Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", arXiv:1503.02531, section 2.
"""

import dataclasses

from kd_jax.objectives.divergence import Softened, gap_sum, key_of


@dataclasses.dataclass(frozen=True)
class ForwardKL(Softened):
    """T^2 sum_v q (log q - log p), q = softmax(teacher / T), p = softmax(student / T)."""

    def sums(self, rows, temperature):
        gap = gap_sum("kl", rows, rows.teacher, rows.student, temperature)
        return {**super().sums(rows, temperature), **gap}

    def value(self, rows, sums, temperature):
        student, teacher = rows.student, rows.teacher
        mass_C1 = sums[teacher.name, key_of(temperature)]
        mean_gap_C1 = sums["kl", student.name, key_of(temperature)] / mass_C1 / temperature
        normalisers_C1 = student.log_normaliser(temperature, sums) - teacher.log_normaliser(
            temperature, sums
        )
        return self._factor(temperature) * (mean_gap_C1 + normalisers_C1)

    def grad(self, rows, sums, temperature):
        q_CV = rows.teacher.probs(temperature, sums)
        return self._slope(temperature) * (rows.student.probs(temperature, sums) - q_CV)


make = ForwardKL
