"""Defines row-wise metrics that are logged, not trained: accuracy, agreement with the teacher."""

import dataclasses

import jax.numpy as jnp

from kd_jax.objectives.divergence import Divergence, key_of
from kd_jax.objectives.kl import ForwardKL
from kd_jax.objectives.reverse_kl import ReverseKL
from kd_jax.objectives.vocab import RowTerm


class _Measure(Divergence):
    has_temperature = False

    def sums(self, rows, temperature):
        return {}

    def grad(self, rows, sums, temperature):
        return jnp.zeros_like(rows.student.logits_CV)


@dataclasses.dataclass(frozen=True)
class Accuracy(_Measure):
    """Accuracy: 1 if the student's most likely class or token is the label."""

    needs_teacher = False

    def value(self, rows, sums, temperature):
        right_C = rows.student.first_choice() == rows.labels_C
        return right_C.astype(jnp.float32)[:, None]


@dataclasses.dataclass(frozen=True)
class Agreement(_Measure):
    """Agreement: 1 if student and teacher have the same most likely class or token."""

    def value(self, rows, sums, temperature):
        same_C = rows.student.first_choice() == rows.teacher.first_choice()
        return same_C.astype(jnp.float32)[:, None]


@dataclasses.dataclass(frozen=True)
class Entropy(_Measure):
    """Entropy of the student's distribution, in nats."""

    needs_teacher = False

    def sums(self, rows, temperature):
        return rows.student.normalizer(1.0) | rows.student.surprise()

    def value(self, rows, sums, temperature):
        return rows.student.entropy(sums)


@dataclasses.dataclass(frozen=True)
class OutsideMass(_Measure):
    """The teacher's probability of ids that the student lacks, which no term compares."""

    def sums(self, rows, temperature):
        teacher = rows.whole_teacher
        probs_CV, ids_CV = teacher.exp(1.0), teacher.columns.ids(teacher.logits_CV.shape)
        outside_CV = jnp.where(ids_CV >= rows.shared, probs_CV, 0.0)
        return teacher.normalizer(1.0) | {"outside": outside_CV}

    def value(self, rows, sums, temperature):
        return sums["outside"] / sums[rows.whole_teacher.name, key_of(1.0)]


@dataclasses.dataclass(frozen=True)
class CalibrationGap(_Measure):
    """1 if the most likely token is the label, minus its probability, where this lies in one of
    `BINS` equal bins; 0 elsewhere. See `expected_calibration_error`."""

    needs_teacher = False
    bin: int = 0

    def sums(self, rows, temperature):
        return rows.student.normalizer(1.0)

    def value(self, rows, sums, temperature):
        sure_C1 = 1.0 / sums[rows.student.name, key_of(1.0)]
        right_C1 = (rows.student.first_choice() == rows.labels_C)[:, None]
        own_C1 = jnp.minimum((sure_C1 * BINS).astype(jnp.int32), BINS - 1) == self.bin
        return jnp.where(own_C1, right_C1 - sure_C1, 0.0)


BINS = 15  # as Guo et al.
CALIBRATION = tuple(RowTerm(f"gap_{i}", CalibrationGap(i)) for i in range(BINS))


def expected_calibration_error(found: dict[str, float]) -> dict[str, float]:
    """Replaces the means of `CALIBRATION` among metrics by "ece": the mean distance, over tokens,
    of accuracy and confidence in each bin. Guo et al., arXiv:1706.04599, eq. 3."""
    gaps = [found.pop(term.name) for term in CALIBRATION]
    return found | {"ece": sum(map(abs, gaps))}


ACCURACY = RowTerm("accuracy", Accuracy())
OUTSIDE = RowTerm("teacher_outside", OutsideMass())  # where the teacher has more ids
KL_T1 = RowTerm("kl_t1", ForwardKL(), 1.0)  # logged whatever the training temperature is
# On words that the student wrote.
REVERSE_KL_T1 = RowTerm("reverse_kl_t1", ReverseKL(), 1.0)
ENTROPY = RowTerm("entropy", Entropy())
