"""Tables of figures, printed with rich or written as Markdown.

`of_runs` shows one configuration: a row for each figure, a column for each stage, and the
difference student - baseline, paired by seed. `of_groups` puts configurations under each other.
Several seeds are shown as mean ± sample standard deviation, their differences as mean ± standard
error. The primary figure is the one by which a run selects and is judged: the loss of a language
model, a task's own metric otherwise.
"""

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import rich.console
import rich.table
from rich.cells import cell_len
from rich.text import Text

from kd_jax.report import quantities
from kd_jax.report.quantities import MISSING, Figure, Figures, Stages, cost, quality, the_primary

_LABEL = 20  # characters of a label that must fit beside the figures; a longer one is wrapped
REFERENCE = "teacher"  # the stage that others are measured against; never printed as the best


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
        """Prints it, in parts where the screen is narrower; whole where that is no terminal."""
        console = rich.console.Console()
        if not console.is_terminal:
            console = rich.console.Console(width=10_000)
        if self.title:
            console.print(Text(self.title, "italic"))
        for columns, widths in self._parts(console.width):
            table = rich.table.Table()
            for j in columns:
                justify, width = "left" if j < self.labels else "right", widths.get(j)
                name = Text(self._names()[j])
                table.add_column(name, justify=justify, overflow="fold", width=width)
            for row in self.rows:
                if any(row[j] for j in columns[self.labels :] or columns):
                    table.add_row(*(Text(row[j]) for j in columns))
            console.print(table)

    def _parts(self, width: int) -> Iterator[tuple[list[int], dict[int, int]]]:
        """Columns that fit beside each other, each time after the labels, and the widths of those
        that must not be wrapped: a figure is never broken, a heading between its words."""
        cells = [[cell_len(cell) for cell in column] for column in zip(*self.rows, strict=True)]
        names, labels = self._names(), [*range(self.labels)]
        if sum(max(cell_len(n), *c) + 3 for n, c in zip(names, cells, strict=True)) < width:
            yield [*range(len(names))], {}
            return
        words = [max(map(cell_len, [*name.split(), ""])) for name in names]
        needed = {j: max(words[j], *cells[j]) for j in range(self.labels, len(names))}
        room = width - 1 - sum(min(max(words[j], *cells[j]), _LABEL) + 3 for j in labels)
        part: list[int] = []
        for j in needed:
            if part and sum(needed[i] + 3 for i in [*part, j]) > room:
                yield labels + part, needed
                part = []
            part.append(j)
        yield labels + part, needed

    def markdown(self) -> str:
        """Writes the title and a Markdown table, ending in a newline."""
        rule = ["---" if i < self.labels else "---:" for i in range(len(self.header))]
        marked = [
            [self._marked(i, j, _escaped(cell)) for j, cell in enumerate(row)]
            for i, row in enumerate(self.rows)
        ]
        lines = [[*map(_escaped, self._names())], rule, *marked]
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


def _escaped(cell: str) -> str:
    """A cell as Markdown: in one line, its bars no ends of it."""
    return " ".join(cell.split("\n")).replace("|", "\\|")


def by_stage(
    title: str,
    runs: Sequence[Stages],
    figures: Iterable[Figure],
    header: Sequence[str] = (),
    more: Callable[[Figure], list[str]] = lambda figure: [],
    best: Callable[[Figure], Iterable[int]] = lambda figure: (),
) -> Table:
    """Shows a row for each figure, a column for each stage, and columns under `header`.

    Args:
      more: a figure's cells under `header`.
      best: places, among `stages_of(runs)`, of the stages that stand out in a figure.
    """
    names, rows, marked = stages_of(runs), [], set()
    for figure in figures:
        if any(stage.get(figure.key) is not None for run in runs for stage in run.values()):
            marked |= {(len(rows), 1 + j) for j in best(figure)}
            means = [mean(figure, of(name, runs)) for name in names]
            rows.append([figure.title, *means, *more(figure)])
    return Table(title, ["", *names, *header], rows, best=frozenset(marked))


def of_runs(runs: Sequence[Stages], title: str = "", primary: str = "loss") -> Table:
    """Shows the stages of one configuration, over its seeds; what a stage lacks (or None) is "-".

    `primary` is the key of the figure whose wins the title counts.
    """
    both, good = _with_both(runs), quality(runs)
    if len(runs) > 1:
        title += f", {len(runs)} seeds: mean ± standard deviation"
    if len(both) > 1:
        judged = the_primary(good, primary)
        direction = "higher" if judged.better > 0 else "lower"
        title += ", differences ± standard error"
        if (won := paired(judged, both)) is not None:
            title += f"; student's {primary} {direction} in {won.wins} of {len(both)}"
    header = ["student - baseline"] if both else []

    def difference(figure: Figure) -> list[str]:
        return [_difference(figure, both) if figure in good else ""] if both else []

    return by_stage(title, runs, good + cost(runs), header, difference)


def of_groups(
    groups: Mapping[str, Sequence[Stages]], title: str = "", primary: str = "loss"
) -> Table:
    """Shows a row for each stage of each configuration, with the difference of a student."""
    everything = [run for runs in groups.values() for run in runs]
    figures = quality(everything)
    judged = the_primary(figures, primary) if _with_both(everything) else None
    rows = []
    for label, runs in groups.items():
        for stage in stages_of(runs):
            found = of(stage, runs)
            row = [label, stage, str(len(found)), *(mean(figure, found) for figure in figures)]
            both = _with_both(runs) if stage == "student" else []
            if judged:
                row.append(_difference(judged, both) if both else "")
            rows.append(row)
    header = ["run", "stage", "seeds", *(figure.title for figure in figures)]
    header += [f"{primary} - baseline's"] if judged else []
    return Table(title, header, rows, labels=2)


def stages_of(runs: Iterable[Stages]) -> list[str]:
    """Lists the stages that any of the runs has."""
    return list(dict.fromkeys(stage for run in runs for stage in run))


def of(stage: str, runs: Iterable[Stages]) -> list[Figures]:
    """Gathers the figures of a stage from the runs that have it."""
    return [run[stage] for run in runs if stage in run]


def mean(figure: Figure, stages: Sequence[Figures]) -> str:
    """Shows the mean, with ± standard deviation where the values differ."""
    if (middle := average(figure, stages)) is None:
        return MISSING
    text, values = figure.show(middle), [stage[figure.key] for stage in stages]
    if min(values) != max(values):
        text += f" ± {figure.show(statistics.stdev(values))}"
    return text


def average(figure: Figure, stages: Sequence[Figures]) -> float | None:
    """Takes the mean; None where a stage lacks the figure, or has one that is not finite."""
    values = [stage.get(figure.key) for stage in stages]
    if not values or None in values or not all(map(math.isfinite, values)):
        return None
    return statistics.fmean(values)


def best(figure: Figure, values: Sequence[float | None], margin: float = 0.0) -> list[int]:
    """Finds where the best value stands; nowhere without a choice, or if it is not so clear."""
    known = sorted({figure.better * value for value in values if value is not None})
    if figure.better == 0 or len(known) < 2 or known[-1] - known[-2] < margin * abs(known[-2]):
        return []
    return [i for i, v in enumerate(values) if v is not None and figure.better * v == known[-1]]


def shown_best(figure: Figure, names: Sequence[str], runs: Iterable[Stages]) -> list[int]:
    """Finds the stage that is better than each other one by more than chance (`quantities.Paired`),
    the teacher left out; its place, or nothing if that is not shown of any."""
    runs = list(runs)
    rivals = [name for name in names if name != REFERENCE]

    def beats(one: str, other: str) -> bool:
        both = [run for run in runs if {one, other} <= {*run}]
        found = quantities.compare(figure, [run[one] for run in both], [run[other] for run in both])
        return found is not None and found.verdict == "better"

    return [
        names.index(one)
        for one in rivals
        if len(rivals) > 1 and all(beats(one, other) for other in rivals if other != one)
    ]


def _with_both(runs: Iterable[Stages]) -> list[Stages]:
    return [run for run in runs if {"student", "baseline"} <= {*run}]


def paired(figure: Figure, runs: Sequence[Stages]) -> quantities.Paired | None:
    """Compares student and baseline in the runs that have both; None where one lacks the figure."""
    both = _with_both(runs)
    return quantities.compare(
        figure, [run["student"] for run in both], [run["baseline"] for run in both]
    )


def _difference(figure: Figure, runs: Sequence[Stages]) -> str:
    found = paired(figure, runs)
    return MISSING if found is None else found.show()
