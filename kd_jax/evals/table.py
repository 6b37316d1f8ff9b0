"""Tables of figures, printed with rich or written as Markdown.

`of_runs` shows one configuration: a row for each figure, a column for each stage, and the
difference student - baseline, paired by seed. `of_groups` puts configurations under each other.
Several seeds are shown as mean ± sample standard deviation. The primary figure is the one by which
a run selects and is judged: the loss of a language model, a task's own metric otherwise.
"""

import dataclasses
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import rich.console
import rich.table

from kd_jax.errors import UserError

Figures = Mapping[str, Any]  # of one stage, as in results.json
Stages = Mapping[str, Figures]  # of one run
MISSING = "-"


@dataclasses.dataclass(frozen=True)
class Table:
    """Cells as text; the first `labels` columns are aligned left, the others right."""

    title: str
    header: list[str]
    rows: list[list[str]]
    labels: int = 1
    best: frozenset[tuple[int, int]] = frozenset()  # (row, column) of the cells to stand out
    spans: tuple[tuple[str, int], ...] = ()  # headings over the columns after the labels

    def print(self) -> None:
        """To the screen, or unwrapped where the output is no terminal."""
        console = rich.console.Console()
        if not console.is_terminal:
            console = rich.console.Console(width=250)
        table = rich.table.Table(title=self.title, title_justify="left")
        for i, name in enumerate(self._names()):
            justify = "left" if i < self.labels else "right"
            table.add_column(name, justify=justify, overflow="fold")
        for row in self.rows:
            table.add_row(*row)
        console.print(table)

    def markdown(self) -> str:
        """The title and a Markdown table, ending in a newline."""
        rule = ["---" if i < self.labels else "---:" for i in range(len(self.header))]
        escaped = [
            [self._marked(i, j, cell.replace("|", "\\|")) for j, cell in enumerate(row)]
            for i, row in enumerate(self.rows)
        ]
        lines = [self._names(), rule, *escaped]
        title = f"**{self.title}**\n\n" if self.title else ""
        return title + "".join(f"| {' | '.join(cells)} |\n" for cells in lines)

    def _names(self) -> list[str]:
        """The header, with what stands over a column before its name."""
        over = [""] * self.labels + [name for name, width in self.spans for _ in range(width)]
        if not self.spans:
            return self.header
        return [f"{a} {b}".strip() for a, b in zip(over, self.header, strict=True)]

    def _marked(self, row: int, column: int, cell: str) -> str:
        return f"**{cell}**" if (row, column) in self.best else cell


@dataclasses.dataclass(frozen=True)
class Figure:
    """How one figure of a stage's results is shown."""

    key: str
    title: str
    show: Callable[[float], str]
    better: int = 0  # +1 if bigger is better, -1 if smaller is, 0 where neither is

    def signed(self, difference: float) -> str:
        """A difference with its sign."""
        return ("+" if difference > 0 else "") + self.show(difference)


def count(number: float) -> str:
    """A number of parameters: 66,362,880 is 66.36 M."""
    return f"{number / 1e6:.2f} M" if abs(number) >= 1e5 else f"{number:,.0f}"


def _thousands(number: float) -> str:
    return f"{number:,.0f}"


def _operations(number: float) -> str:
    return f"{number / 1e9:.3f} G"


_SHARE, _PERCENT = "{:.4f}".format, "{:.2f}".format

COST = (
    Figure("parameters", "parameters", count, -1),
    Figure("reduction_percent", "reduction of parameters (%)", _PERCENT),
    Figure("size_mb", "size (MB)", "{:.1f}".format, -1),
    Figure("flops_per_sample", "operations a sample", _operations, -1),
    Figure("latency_ms", "latency, batch 1 (ms)", _PERCENT, -1),
    Figure("latency_ms_p90", "latency, 90th percentile (ms)", _PERCENT, -1),
    Figure("throughput", "samples/s, batch 32", _thousands, 1),
    Figure("tokens_per_second", "tokens/s", _thousands),
    Figure("steps", "steps", _thousands),
    Figure("fit_steps", "steps of regression", _thousands),
    Figure("best_step", "best step", _thousands),
)


def quality(runs: Iterable[Stages]) -> list[Figure]:
    """The figures of quality that these runs have, in their units.

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
    """The figures of cost that these runs have."""
    stages = [stage for run in runs for stage in run.values()]
    return [f for f in COST if any(stage.get(f.key) is not None for stage in stages)]


def the_primary(figures: Iterable[Figure], key: str) -> Figure:
    """The figure named `key`; raises UserError where no run has it."""
    found = {figure.key: figure for figure in figures}
    if key not in found:
        have = ", ".join(found) or "none"
        raise UserError(f"results.json: primary={key!r}, but no stage has that figure: have {have}")
    return found[key]


def of_runs(runs: Sequence[Stages], title: str = "", primary: str = "loss") -> Table:
    """The stages of one configuration, over its seeds; what a stage lacks (or None) is "-".

    `primary` is the key of the figure whose wins the title counts.
    """
    stages = stages_of(runs)
    pairs = _pairs(runs)
    good = quality(runs)
    rows = []
    for figure in good + cost(runs):
        row = [figure.title]
        row += [mean(figure, [run[stage] for run in runs if stage in run]) for stage in stages]
        if pairs:
            row.append(_difference(figure, pairs) if figure in good else "")
        rows.append(row)
    header = ["", *stages, *(["student - baseline"] if pairs else [])]
    if len(runs) > 1:
        title += f", {len(runs)} seeds: mean ± standard deviation"
    if pairs and len(runs) > 1:
        title += f"; student's {_wins(the_primary(good, primary), pairs)}"
    return Table(title, header, rows)


def of_groups(
    groups: Mapping[str, Sequence[Stages]], title: str = "", primary: str = "loss"
) -> Table:
    """A row for each stage of each configuration, with the difference where it is a student."""
    everything = [run for runs in groups.values() for run in runs]
    figures = quality(everything)
    judged = the_primary(figures, primary) if _pairs(everything) else None
    rows = []
    for label, runs in groups.items():
        for stage in stages_of(runs):
            found = [run[stage] for run in runs if stage in run]
            row = [label, stage, str(len(found)), *(mean(figure, found) for figure in figures)]
            pairs = _pairs(runs) if stage == "student" else []
            if judged:
                row.append(_difference(judged, pairs) if pairs else "")
            rows.append(row)
    header = ["run", "stage", "seeds", *(figure.title for figure in figures)]
    header += [f"{primary} - baseline's"] if judged else []
    return Table(title, header, rows, labels=2)


def stages_of(runs: Iterable[Stages]) -> list[str]:
    """The stages that any of the runs has."""
    return list(dict.fromkeys(stage for run in runs for stage in run))


def mean(figure: Figure, stages: Sequence[Figures]) -> str:
    """The mean, with ± standard deviation where the values differ."""
    values = [stage.get(figure.key) for stage in stages]
    if not values or None in values:
        return MISSING
    text = figure.show(statistics.fmean(values))
    if min(values) != max(values):
        text += f" ± {figure.show(statistics.stdev(values))}"
    return text


def _pairs(runs: Iterable[Stages]) -> list[tuple[Figures, Figures]]:
    """(student, baseline) of the runs that have both."""
    return [(run["student"], run["baseline"]) for run in runs if {"student", "baseline"} <= {*run}]


def _wins(figure: Figure, pairs: list[tuple[Figures, Figures]]) -> str:
    won = sum(
        figure.better * (student[figure.key] - baseline[figure.key]) > 0
        for student, baseline in pairs
    )
    return f"{figure.key} {'higher' if figure.better > 0 else 'lower'} in {won} of {len(pairs)}"


def _difference(figure: Figure, pairs: Sequence[tuple[Figures, Figures]]) -> str:
    """The mean of the paired differences with its sign, ± their standard deviation."""
    values = [(a.get(figure.key), b.get(figure.key)) for a, b in pairs]
    if any(None in pair for pair in values):
        return MISSING
    differences = [a - b for a, b in values]
    text = figure.signed(statistics.fmean(differences))
    if len(differences) > 1:
        text += f" ± {figure.show(statistics.stdev(differences))}"
    return text
