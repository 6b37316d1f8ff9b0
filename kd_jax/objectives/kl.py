"""`kl`: forward Kullback-Leibler divergence KL(teacher || student) of softened distributions.

Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", arXiv:1503.02531, section 2.
"""

import dataclasses

from kd_jax.objectives.rows import Divergence, key_of


@dataclasses.dataclass(frozen=True)
class ForwardKL(Divergence):
    """T^2 sum_v q (log q - log p), q = softmax(teacher / T), p = softmax(student / T).

    T^2 keeps the size of the gradient independent of T; `t_squared=False` leaves it out.
    """

    t_squared: bool = True

    def sums(self, rows, temperature):
        student, teacher = rows.student, rows.teacher
        gap_CV = teacher.shifted_CV - student.shifted_CV
        return {
            **student.normaliser(temperature),
            **teacher.normaliser(temperature),
            ("kl", student.name, key_of(temperature)): teacher.exp(temperature) * gap_CV,
        }

    def value(self, rows, sums, temperature):
        student, teacher = rows.student, rows.teacher
        mass_C1 = sums[teacher.name, key_of(temperature)]
        mean_gap_C1 = sums["kl", student.name, key_of(temperature)] / mass_C1 / temperature
        normalisers_C1 = student.log_normaliser(temperature, sums) - teacher.log_normaliser(
            temperature, sums
        )
        factor = temperature**2 if self.t_squared else 1.0
        return factor * (mean_gap_C1 + normalisers_C1)

    def grad(self, rows, sums, temperature):
        factor = temperature if self.t_squared else 1.0 / temperature
        q_CV = rows.teacher.probs(temperature, sums)
        return factor * (rows.student.probs(temperature, sums) - q_CV)


def make(t_squared: bool = True) -> ForwardKL:
    """`t_squared` multiplies by T^2 (the default, as Hinton et al.)."""
    return ForwardKL(t_squared)
