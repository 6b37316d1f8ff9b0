"""Defines the term `logit_mse`: squared distance of the logits.

Ba and Caruana, "Do Deep Nets Really Need to be Deep?", arXiv:1312.6184, eq. 2; summed over the
vocabulary as in DistilBERT's `alpha_mse`.
"""

import dataclasses

from kd_jax.objectives.divergence import Divergence


@dataclasses.dataclass(frozen=True)
class LogitMSE(Divergence):
    """The squared distance sum_v (s - t)^2 of each row's logits, without temperature."""

    has_temperature = False
    suits = ("classes", "regression")
    of_probabilities = False

    def sums(self, rows, temperature):
        gap_CV = rows.student.logits_CV - rows.teacher.logits_CV
        return {("logit_mse", rows.student.name): gap_CV * gap_CV}

    def value(self, rows, sums, temperature):
        return sums["logit_mse", rows.student.name]

    def grad(self, rows, sums, temperature):
        return 2.0 * (rows.student.logits_CV - rows.teacher.logits_CV)


make = LogitMSE
