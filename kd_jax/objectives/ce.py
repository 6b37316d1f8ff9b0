"""Defines the term `ce`: cross-entropy of the student with the labels."""

import dataclasses

import jax.numpy as jnp

from kd_jax.objectives.divergence import Divergence


@dataclasses.dataclass(frozen=True)
class CrossEntropy(Divergence):
    """Cross-entropy, -log softmax(s)[label], nats a row, without temperature."""

    needs_teacher = False
    has_temperature = False

    def sums(self, rows, temperature):
        return rows.student.normalizer(1.0)

    def value(self, rows, sums, temperature):
        return rows.student.log_normalizer(1.0, sums) - rows.student_at_label()

    def grad(self, rows, sums, temperature):
        return rows.student.probs(1.0, sums) - jnp.where(rows.is_label(), 1.0, 0.0)


make = CrossEntropy
