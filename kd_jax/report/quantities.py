"""Defines a stage's metrics and costs: names, format, which direction is better, means over seeds,
and differences between two models.

A difference is paired by seed, so that effects of a seed on both models (the order of batches, the
initial values) cancel. Its error is the standard error of the mean over the seeds; the interval is
Student's, at 95%.
"""

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from scipy import special

Figures = Mapping[str, Any]  # of one stage, as in results.json
Stages = Mapping[str, Figures]  # of one run
MISSING = "-"
CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Figure:
    """The name, unit, format and direction of one figure (metric or cost) in a stage's results."""

    key: str
    name: str
    unit: str  # "" for none
    show: Callable[[float], str]
    better: int = 0  # +1 if bigger is better, -1 if smaller is, 0 where neither is

    @property
    def title(self) -> str:
        """Returns the name with the unit, for headings of tables."""
        return f"{self.name} ({self.unit})" if self.unit else self.name

    def signed(self, difference: float) -> str:
        """Formats a difference with its sign."""
        return ("+" if difference > 0 else "") + self.show(difference).replace("-", "−")


def count(number: float) -> str:
    """Formats a number of parameters: 66,362,880 is 66.36 M."""
    return f"{number / 1e6:.2f} M" if abs(number) >= 1e5 else f"{number:,.0f}"


def _flops(number: float) -> str:
    giga = number / 1e9
    return f"{giga:.3f} G" if giga >= 0.1 else f"{1e3 * giga:.3g} M"


def _training_flops(number: float) -> str:
    tera = number / 1e12
    return f"{tera:,.1f} T" if tera >= 1 else _flops(number)


_SHARE, _PERCENT, _THOUSANDS = "{:.4f}".format, "{:.2f}".format, "{:,.0f}".format
_NATS = "nats/{row}"  # a row is a token or an example

QUALITY = (
    Figure("loss", "loss", _NATS, _SHARE, -1),
    Figure("perplexity", "perplexity", "", "{:.3f}".format, -1),
    Figure("accuracy", "accuracy", "", _SHARE, 1),
    Figure("f1", "F1", "", _SHARE, 1),
    Figure("macro_f1", "macro F1", "", _SHARE, 1),
    Figure("matthews_correlation", "Matthews correlation", "", _SHARE, 1),
    Figure("pearson", "Pearson correlation", "", _SHARE, 1),
    Figure("spearman", "Spearman correlation", "", _SHARE, 1),
    Figure("ndcg@10", "nDCG@10", "", _SHARE, 1),
    Figure("mrr@10", "MRR@10", "", _SHARE, 1),
    Figure("recall@10", "recall@10", "", _SHARE, 1),
    Figure("recall@100", "recall@100", "", _SHARE, 1),
    Figure("map", "MAP", "", _SHARE, 1),
    Figure("exact_match", "exact match", "", _PERCENT, 1),
    Figure("HasAns_exact_match", "exact match, answerable", "", _PERCENT, 1),
    Figure("HasAns_f1", "F1, answerable", "", _PERCENT, 1),
    Figure("NoAns_exact_match", "exact match, unanswerable", "", _PERCENT, 1),
    Figure("NoAns_f1", "F1, unanswerable", "", _PERCENT, 1),
    Figure("kl", "KL to teacher", _NATS, _SHARE, -1),
    Figure("agreement", "top-1 agreement", "", _SHARE, 1),
    Figure("own_kl", "KL to teacher, own text", _NATS, _SHARE, -1),
    Figure("own_reverse_kl", "reverse KL, own text", _NATS, _SHARE, -1),
    Figure("own_entropy", "entropy, own text", _NATS, _SHARE),
    Figure("own_length", "tokens of a completion", "", "{:.1f}".format),
    Figure("own_ended", "completions that end", "", _SHARE),
    Figure("ece", "expected calibration error", "", _SHARE, -1),
)
COST = (
    Figure("parameters", "parameters", "", count, -1),
    Figure("reduction_percent", "reduction of parameters", "%", _PERCENT),
    Figure("size_mb", "size", "MB", lambda mb: f"{mb:.1f}" if mb >= 1 else f"{mb:.2f}", -1),
    Figure("flops_per_sample", "FLOPs of a sample", "", _flops, -1),
    Figure("latency_ms", "latency, batch 1", "ms", _PERCENT, -1),
    Figure("latency_ms_p90", "latency, 90th percentile", "ms", _PERCENT, -1),
    Figure("throughput", "samples/s, batch 32", "", _THOUSANDS, 1),
    Figure("tokens_per_second", "tokens/s", "", _THOUSANDS),
    Figure("steps", "steps", "", _THOUSANDS),
    Figure("fit_steps", "steps of regression", "", _THOUSANDS),
    Figure("training_flops", "FLOPs of training", "", _training_flops),
    Figure("best_step", "best step", "", _THOUSANDS),
)


def quality(runs: Iterable[Stages]) -> list[Figure]:
    """Lists the metrics of quality in these runs, with their units."""
    stages = [stage for run in runs for stage in run.values()]
    return of_keys(key for stage in stages for key in stage if stage[key] is not None)


def of_keys(keys: Iterable[str]) -> list[Figure]:
    """Lists the metrics of quality with these keys, with their units.

    Losses of language models (which have a perplexity) are in nats a token, others in nats an
    example, but for regressions (which have a correlation). SQuAD's F1 is in percent.
    """
    keys, found = set(keys), []
    row = "token" if "perplexity" in keys else "example"
    for figure in (figure for figure in QUALITY if figure.key in keys):
        changes = {"unit": figure.unit.format(row=row)}
        if figure.key == "loss" and not keys.isdisjoint(("pearson", "spearman")):
            changes = {"name": "mean squared error", "unit": ""}
        if figure.key == "f1" and "exact_match" in keys:
            changes["show"] = _PERCENT
        found.append(dataclasses.replace(figure, **changes))
    return found


def cost(runs: Iterable[Stages]) -> list[Figure]:
    """Lists the costs (latency, size, ...) in these runs."""
    stages = [stage for run in runs for stage in run.values()]
    return [f for f in COST if any(stage.get(f.key) is not None for stage in stages)]


def stages_of(runs: Iterable[Stages]) -> list[str]:
    """Lists the stages that any of the runs has."""
    return list(dict.fromkeys(stage for run in runs for stage in run))


def of(stage: str, runs: Iterable[Stages]) -> list[Figures]:
    """Gathers the figures of a stage from the runs that have it."""
    return [run[stage] for run in runs if stage in run]


def average(figure: Figure, stages: Sequence[Figures]) -> float | None:
    """Computes a figure's mean over seeds; None if one lacks it or its value is not finite."""
    values = [stage.get(figure.key) for stage in stages]
    if not values or None in values or not all(map(math.isfinite, values)):
        return None
    return statistics.fmean(values)


def mean(figure: Figure, stages: Sequence[Figures]) -> str:
    """Formats a figure's mean over stages, with ± standard deviation if the values differ."""
    if (middle := average(figure, stages)) is None:
        return MISSING
    text, values = figure.show(middle), [stage[figure.key] for stage in stages]
    if min(values) != max(values):
        text += f" ± {figure.show(statistics.stdev(values))}"
    return text


def best(figure: Figure, values: Sequence[float | None], margin: float) -> list[int]:
    """Finds the indices of the best value; none if there is only one value, or if it is not better
    than the others by the share `margin`."""
    known = sorted({figure.better * value for value in values if value is not None})
    if figure.better == 0 or len(known) < 2 or known[-1] - known[-2] < margin * abs(known[-2]):
        return []
    return [i for i, v in enumerate(values) if v is not None and figure.better * v == known[-1]]


def shown_best(
    figure: Figure, names: Sequence[str], runs: Iterable[Stages], teacher: str = ""
) -> list[int]:
    """Finds the stage, except teachers, that is significantly better than each other one
    (`Paired`): its index among `names`, or none."""
    runs, rivals = list(runs), [name for name in names if name != teacher]

    def beats(one: str, other: str) -> bool:
        found = compare_stages(figure, one, other, runs)
        return found is not None and found.verdict == "better"

    return [
        names.index(one)
        for one in rivals
        if len(rivals) > 1 and all(beats(one, other) for other in rivals if other != one)
    ]


@dataclasses.dataclass(frozen=True)
class Paired:
    """The paired differences of a figure between models a and b, over the seeds that both have."""

    figure: Figure
    differences: list[float]  # a - b, one a seed

    @property
    def mean(self) -> float:
        return statistics.fmean(self.differences)

    @property
    def error(self) -> float | None:
        """Computes the standard error of the mean; None for a single seed."""
        n = len(self.differences)
        return statistics.stdev(self.differences) / math.sqrt(n) if n > 1 else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Computes the 95% confidence interval of the mean; None for a single seed."""
        if self.error is None:
            return None
        reach = self.error * special.stdtrit(len(self.differences) - 1, (1 + CONFIDENCE) / 2)
        return self.mean - reach, self.mean + reach

    @property
    def wins(self) -> int:
        """Counts the seeds for which a is better."""
        return sum(self.figure.better * difference > 0 for difference in self.differences)

    @property
    def verdict(self) -> str:
        """Tells whether a is "better" or "worse" than b, or "open" if there is a single seed or the
        interval contains zero."""
        if self.interval is None or self.interval[0] <= 0 <= self.interval[1]:
            return "open"
        return "better" if self.figure.better * self.mean > 0 else "worse"

    def show(self) -> str:
        """Formats mean and standard error: +0.0083 ± 0.0021."""
        text = self.figure.signed(self.mean)
        return text if self.error is None else f"{text} ± {self.figure.show(self.error)}"

    def show_interval(self) -> str:
        """Formats the interval: +0.0010 to +0.0150, or "-"."""
        if self.interval is None:
            return MISSING
        return " to ".join(map(self.figure.signed, self.interval))


def compare(figure: Figure, a: Sequence[Figures], b: Sequence[Figures]) -> Paired | None:
    """Compares a and b, lists over the same seeds; None if one lacks the figure, or has a value
    that is not finite."""
    values = [(one.get(figure.key), other.get(figure.key)) for one, other in zip(a, b, strict=True)]
    if not values or any(None in pair for pair in values):
        return None
    differences = [one - other for one, other in values]
    return Paired(figure, differences) if all(map(math.isfinite, differences)) else None


def compare_stages(figure: Figure, one: str, other: str, runs: Iterable[Stages]) -> Paired | None:
    """Compares two stages in the runs that have both; None if one lacks the figure."""
    both = [run for run in runs if {one, other} <= {*run}]
    return compare(figure, of(one, both), of(other, both))
