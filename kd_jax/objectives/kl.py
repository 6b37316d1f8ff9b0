"""Defines the term `kl`: forward KL divergence KL(teacher || student) of softened distributions.

Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", arXiv:1503.02531, section 2.
"""

import dataclasses

from kd_jax.objectives.divergence import Softened


@dataclasses.dataclass(frozen=True)
class ForwardKL(Softened):
    """Forward KL, T^2 sum_v q (log q - log p): q = softmax(teacher / T), p = softmax(student / T).
    Its gradient is written out."""

    def sums(self, rows, temperature):
        return super().sums(rows, temperature) | rows.teacher.gap(rows.student, temperature)

    def value(self, rows, sums, temperature):
        return self._factor(temperature) * rows.teacher.kl(rows.student, temperature, sums)

    def grad(self, rows, sums, temperature):
        q_CV = rows.teacher.probs(temperature, sums)
        return self._slope(temperature) * (rows.student.probs(temperature, sums) - q_CV)


make = ForwardKL
