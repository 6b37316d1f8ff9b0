"""Tables of figures, printed with rich or written as Markdown.

`of_runs` shows one configuration: a row for each figure, a column for each stage, and the
difference student - baseline, paired by seed. `of_groups` puts configurations under each other.
Several seeds are shown as mean ± sample standard deviation.
"""

import dataclasses
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import rich.console
import rich.table

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

    def print(self) -> None:
        """To the screen, or unwrapped where the output is no terminal."""
        console = rich.console.Console()
        if not console.is_terminal:
            console = rich.console.Console(width=250)
        table = rich.table.Table(title=self.title, title_justify="left")
        for i, name in enumerate(self.header):
            justify = "left" if i < self.labels else "right"
            table.add_column(name, justify=justify, overflow="fold")
        for row in self.rows:
            table.add_row(*row)
        console.print(table)

    def markdown(self) -> str:
        """The title and a Markdown table, ending in a newline."""
        rule = ["---" if i < self.labels else "---:" for i in range(len(self.header))]
        escaped = [[cell.replace("|", "\\|") for cell in row] for row in self.rows]
        lines = [self.header, rule, *escaped]
        title = f"**{self.title}**\n\n" if self.title else ""
        return title + "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


@dataclasses.dataclass(frozen=True)
class Figure:
    """How one figure of a stage's results is shown."""

    key: str
    title: str
    show: Callable[[float], str]


def count(number: float) -> str:
    """A number of parameters: 66,362,880 is 66.36 M."""
    return f"{number / 1e6:.2f} M" if number >= 1e5 else f"{number:,.0f}"


def _thousands(number: float) -> str:
    return f"{number:,.0f}"


QUALITY = (
    Figure("loss", "loss (nats/token)", "{:.4f}".format),
    Figure("perplexity", "perplexity", "{:.3f}".format),
    Figure("accuracy", "accuracy", "{:.4f}".format),
    Figure("kl", "KL to teacher (nats/token)", "{:.4f}".format),
    Figure("agreement", "top-1 agreement", "{:.4f}".format),
)
COST = (
    Figure("parameters", "parameters", count),
    Figure("size_mb", "size (MB)", "{:.1f}".format),
    Figure("tokens_per_second", "tokens/s", _thousands),
    Figure("steps", "steps", _thousands),
    Figure("best_step", "best step", _thousands),
)


def of_runs(runs: Sequence[Stages], title: str = "") -> Table:
    """The stages of one configuration, over its seeds; what a stage lacks (or None) is "-"."""
    stages = _stages(runs)
    pairs = _pairs(runs)
    rows = []
    for figure in _present(QUALITY + COST, runs):
        row = [figure.title]
        row += [_mean(figure, [run[stage] for run in runs if stage in run]) for stage in stages]
        if pairs:
            row.append(_difference(figure, pairs) if figure in QUALITY else "")
        rows.append(row)
    header = ["", *stages, *(["student - baseline"] if pairs else [])]
    if len(runs) > 1:
        title += f", {len(runs)} seeds: mean ± standard deviation"
    if pairs:
        title += f"; student's loss lower in {_wins(pairs)}" if len(runs) > 1 else ""
    return Table(title, header, rows)


def of_groups(groups: Mapping[str, Sequence[Stages]], title: str = "") -> Table:
    """A row for each stage of each configuration, with the difference where it is a student."""
    everything = [run for runs in groups.values() for run in runs]
    figures = _present(QUALITY, everything)
    difference = _pairs(everything) != []
    rows = []
    for label, runs in groups.items():
        for stage in _stages(runs):
            found = [run[stage] for run in runs if stage in run]
            row = [label, stage, str(len(found)), *(_mean(figure, found) for figure in figures)]
            pairs = _pairs(runs) if stage == "student" else []
            if difference:
                row.append(_difference(QUALITY[0], pairs) if pairs else "")
            rows.append(row)
    header = ["run", "stage", "seeds", *(figure.title for figure in figures)]
    header += ["loss - baseline's"] if difference else []
    return Table(title, header, rows, labels=2)


def _stages(runs: Iterable[Stages]) -> list[str]:
    return list(dict.fromkeys(stage for run in runs for stage in run))


def _pairs(runs: Iterable[Stages]) -> list[tuple[Figures, Figures]]:
    """(student, baseline) of the runs that have both."""
    return [(run["student"], run["baseline"]) for run in runs if {"student", "baseline"} <= {*run}]


def _wins(pairs: list[tuple[Figures, Figures]]) -> str:
    lower = sum(student["loss"] < baseline["loss"] for student, baseline in pairs)
    return f"{lower} of {len(pairs)}"


def _present(figures: Sequence[Figure], runs: Iterable[Stages]) -> list[Figure]:
    stages = [stage for run in runs for stage in run.values()]
    return [f for f in figures if any(stage.get(f.key) is not None for stage in stages)]


def _mean(figure: Figure, stages: Sequence[Figures]) -> str:
    """The mean, with ± standard deviation where the values differ."""
    values = [stage.get(figure.key) for stage in stages]
    if not values or None in values:
        return MISSING
    text = figure.show(statistics.fmean(values))
    if min(values) != max(values):
        text += f" ± {figure.show(statistics.stdev(values))}"
    return text


def _difference(figure: Figure, pairs: Sequence[tuple[Figures, Figures]]) -> str:
    """The mean of the paired differences with its sign, ± their standard deviation."""
    values = [(a.get(figure.key), b.get(figure.key)) for a, b in pairs]
    if any(None in pair for pair in values):
        return MISSING
    differences = [a - b for a, b in values]
    mean = statistics.fmean(differences)
    text = ("+" if mean > 0 else "") + figure.show(mean)
    if len(differences) > 1:
        text += f" ± {figure.show(statistics.stdev(differences))}"
    return text
