"""Defines the term `mse`: squared error of a regression."""

import dataclasses

from kd_jax.errors import UserError
from kd_jax.objectives.divergence import Divergence


@dataclasses.dataclass(frozen=True)
class MSE(Divergence):
    """The squared error (logit - label)^2 of each row, in squared units of the label. The head has
    one logit, the label is float32; there is neither a temperature nor a teacher."""

    needs_teacher = False
    has_temperature = False
    suits = ("regression",)

    def _gap(self, rows):
        num_classes = rows.student.logits_CV.shape[1]
        if num_classes != 1:
            raise UserError(
                f"objective mse is for a regression: the head has {num_classes} classes"
            )
        return rows.student.logits_CV - rows.labels_C[:, None]

    def sums(self, rows, temperature):
        gap_C1 = self._gap(rows)
        return {"mse": gap_C1 * gap_C1}

    def value(self, rows, sums, temperature):
        return sums["mse"]

    def grad(self, rows, sums, temperature):
        return 2.0 * self._gap(rows)


make = MSE
