"""Differences between two models over the same seeds, and what may be said of them.

A difference is paired by seed: what a seed does to both (the order of batches, the first values)
drops out of it. Its error is the standard error of the mean over the seeds; the interval is
Student's, at 95%.
"""

import dataclasses
import math
import statistics
from collections.abc import Sequence

import scipy.stats

from kd_jax.evals.quantities import MISSING, Figure, Figures

CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Paired:
    """One figure of two models, a and b, over the seeds that both have."""

    figure: Figure
    differences: list[float]  # a - b, one a seed

    @property
    def mean(self) -> float:
        return statistics.fmean(self.differences)

    @property
    def error(self) -> float | None:
        """Standard error of the mean; None for a single seed."""
        n = len(self.differences)
        return statistics.stdev(self.differences) / math.sqrt(n) if n > 1 else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Where the mean over many seeds lies, at 95%; None for a single seed."""
        if self.error is None:
            return None
        reach = self.error * scipy.stats.t.ppf((1 + CONFIDENCE) / 2, len(self.differences) - 1)
        return self.mean - reach, self.mean + reach

    @property
    def wins(self) -> int:
        """Seeds for which a is better."""
        return sum(self.figure.better * difference > 0 for difference in self.differences)

    @property
    def verdict(self) -> str:
        """better | worse (a than b), or open: one seed, or an interval with zero in it."""
        if self.interval is None or self.interval[0] <= 0 <= self.interval[1]:
            return "open"
        return "better" if self.figure.better * self.mean > 0 else "worse"

    def show(self) -> str:
        """+0.0083 ± 0.0021: mean and standard error."""
        text = _signed(self.figure, self.mean)
        return text if self.error is None else f"{text} ± {self.figure.show(self.error)}"

    def show_interval(self) -> str:
        """+0.0010 to +0.0150, or "-"."""
        if self.interval is None:
            return MISSING
        return " to ".join(_signed(self.figure, end) for end in self.interval)


def compare(figure: Figure, a: Sequence[Figures], b: Sequence[Figures]) -> Paired | None:
    """a and b at the same seeds in the same order; None where one lacks the figure, or has one that
    is not finite."""
    values = [(one.get(figure.key), other.get(figure.key)) for one, other in zip(a, b, strict=True)]
    if not values or any(None in pair for pair in values):
        return None
    differences = [one - other for one, other in values]
    return Paired(figure, differences) if all(map(math.isfinite, differences)) else None


def _signed(figure: Figure, difference: float) -> str:
    return figure.signed(difference).replace("-", "−")
