"""The figures that stages of a run have: how they are called, shown, and which way is better; and
what may be said of the difference between two models.

A difference is paired by seed: what a seed does to both (the order of batches, the first values)
drops out of it. Its error is the standard error of the mean over the seeds; the interval is
Student's, at 95%.
"""

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import scipy.stats

from kd_jax.errors import UserError

Figures = Mapping[str, Any]  # of one stage, as in results.json
Stages = Mapping[str, Figures]  # of one run
MISSING = "-"
CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Figure:
    """How one figure of a stage's results is shown."""

    key: str
    title: str
    show: Callable[[float], str]
    better: int = 0  # +1 if bigger is better, -1 if smaller is, 0 where neither is

    def signed(self, difference: float) -> str:
        """Shows a difference with its sign."""
        return ("+" if difference > 0 else "") + self.show(difference).replace("-", "−")


def count(number: float) -> str:
    """Shows a number of parameters: 66,362,880 is 66.36 M."""
    return f"{number / 1e6:.2f} M" if abs(number) >= 1e5 else f"{number:,.0f}"


def _megabytes(number: float) -> str:
    return f"{number:.1f}" if number >= 1 else f"{number:.2f}"


def _operations(number: float) -> str:
    giga = number / 1e9
    return f"{giga:.3f} G" if giga >= 0.1 else f"{1e3 * giga:.3g} M"


def _of_training(number: float) -> str:
    tera = number / 1e12
    return f"{tera:,.1f} T" if tera >= 1 else _operations(number)


_SHARE, _PERCENT, _THOUSANDS = "{:.4f}".format, "{:.2f}".format, "{:,.0f}".format

COST = (
    Figure("parameters", "parameters", count, -1),
    Figure("reduction_percent", "reduction of parameters (%)", _PERCENT),
    Figure("size_mb", "size (MB)", _megabytes, -1),
    Figure("flops_per_sample", "operations a sample", _operations, -1),
    Figure("latency_ms", "latency, batch 1 (ms)", _PERCENT, -1),
    Figure("latency_ms_p90", "latency, 90th percentile (ms)", _PERCENT, -1),
    Figure("throughput", "samples/s, batch 32", _THOUSANDS, 1),
    Figure("tokens_per_second", "tokens/s", _THOUSANDS),
    Figure("steps", "steps", _THOUSANDS),
    Figure("fit_steps", "steps of regression", _THOUSANDS),
    Figure("training_flops", "operations of training", _of_training),
    Figure("best_step", "best step", _THOUSANDS),
)


def quality(runs: Iterable[Stages]) -> list[Figure]:
    """Lists the figures of quality that these runs have, in their units.

    Losses of language models (which have a perplexity) are in nats a token, others in nats an
    example, but for regressions (which have a correlation). SQuAD's figures are percent.
    """
    keys = {
        key for run in runs for stage in run.values() for key in stage if stage[key] is not None
    }
    unit = "nats/token" if "perplexity" in keys else "nats/example"
    regression = not keys.isdisjoint(("pearson", "spearman"))
    scale = _PERCENT if "exact_match" in keys else _SHARE
    figures = (
        Figure("loss", "mean squared error" if regression else f"loss ({unit})", _SHARE, -1),
        Figure("perplexity", "perplexity", "{:.3f}".format, -1),
        Figure("accuracy", "accuracy", _SHARE, 1),
        Figure("f1", "F1", scale, 1),
        Figure("macro_f1", "macro F1", scale, 1),
        Figure("matthews_correlation", "Matthews correlation", _SHARE, 1),
        Figure("pearson", "Pearson correlation", _SHARE, 1),
        Figure("spearman", "Spearman correlation", _SHARE, 1),
        Figure("exact_match", "exact match", scale, 1),
        Figure("HasAns_exact_match", "exact match, answerable", scale, 1),
        Figure("HasAns_f1", "F1, answerable", scale, 1),
        Figure("NoAns_exact_match", "exact match, unanswerable", scale, 1),
        Figure("NoAns_f1", "F1, unanswerable", scale, 1),
        Figure("kl", f"KL to teacher ({unit})", _SHARE, -1),
        Figure("agreement", "top-1 agreement", _SHARE, 1),
    )
    return [figure for figure in figures if figure.key in keys]


def cost(runs: Iterable[Stages]) -> list[Figure]:
    """Lists the figures of cost that these runs have."""
    stages = [stage for run in runs for stage in run.values()]
    return [f for f in COST if any(stage.get(f.key) is not None for stage in stages)]


def the_primary(figures: Iterable[Figure], key: str) -> Figure:
    """Finds the figure named `key`; raises UserError where no run has it."""
    found = {figure.key: figure for figure in figures}
    if key not in found:
        have = ", ".join(found) or "none"
        raise UserError(f"results.json: primary={key!r}, but no stage has that figure: have {have}")
    return found[key]


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
        """Shows mean and standard error: +0.0083 ± 0.0021."""
        text = self.figure.signed(self.mean)
        return text if self.error is None else f"{text} ± {self.figure.show(self.error)}"

    def show_interval(self) -> str:
        """Shows the interval: +0.0010 to +0.0150, or "-"."""
        if self.interval is None:
            return MISSING
        return " to ".join(map(self.figure.signed, self.interval))


def compare(figure: Figure, a: Sequence[Figures], b: Sequence[Figures]) -> Paired | None:
    """Compares a and b at the same seeds in the same order; None where one lacks the figure, or has
    one that is not finite."""
    values = [(one.get(figure.key), other.get(figure.key)) for one, other in zip(a, b, strict=True)]
    if not values or any(None in pair for pair in values):
        return None
    differences = [one - other for one, other in values]
    return Paired(figure, differences) if all(map(math.isfinite, differences)) else None
