"""Makes tables of metrics, printed with rich or written as Markdown.

`of_runs` shows one configuration: a row for each figure, a column for each stage, and the
difference student - baseline, paired by seed. `of_groups` compares configurations by their primary
figure, a row for each.
Several seeds are shown as mean ± sample standard deviation, their differences as mean ± standard
error. The primary figure is the one that selects checkpoints and compares runs: the loss of a
language model, the task's metric otherwise.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import rich.console
import rich.table
from rich.cells import cell_len
from rich.text import Text

from kd_jax.errors import UserError
from kd_jax.report import quantities
from kd_jax.report.quantities import MISSING, Figure, Stages, mean, of, stages_of
from kd_jax.report.runs import Results, roles

SPREAD = ("95% interval", "better in")  # headings of what is known of a difference
_LABEL = 20  # characters of a label that must fit next to the figures; a longer one is wrapped


@dataclasses.dataclass(frozen=True)
class Table:
    """Cells as text; the first `labels` columns are aligned left, the others right."""

    title: str
    header: list[str]
    rows: list[list[str]]
    labels: int = 1
    best: frozenset[tuple[int, int]] = frozenset()  # (row, column) of the cells to stand out

    def print(self) -> None:
        """Prints the table, split into several if the terminal is too narrow."""
        console = rich.console.Console()
        if not console.is_terminal:
            console = rich.console.Console(width=10_000)
        if self.title:
            console.print(Text(self.title, "italic"))
        for columns, widths in self._parts(console.width):
            table = rich.table.Table()
            for j in columns:
                justify, width = "left" if j < self.labels else "right", widths.get(j)
                name = Text(self.header[j])
                table.add_column(name, justify=justify, overflow="fold", width=width)
            for row in self.rows:
                if any(row[j] for j in columns[self.labels :] or columns):
                    table.add_row(*(Text(row[j]) for j in columns))
            console.print(table)

    def _parts(self, width: int) -> Iterator[tuple[list[int], dict[int, int]]]:
        """Splits the table for a narrow screen: yields the columns that fit next to the labels, and
        the minimal widths that keep figures, and words of headings, unbroken."""
        cells = [max([0, *map(cell_len, column)]) for column in zip(*self.rows, strict=True)]
        names, labels = self.header, [*range(self.labels)]
        if sum(max(cell_len(n), c) + 3 for n, c in zip(names, cells, strict=True)) < width:
            yield [*range(len(names))], {}
            return
        needed = [
            max([cell, *map(cell_len, name.split())])
            for name, cell in zip(names, cells, strict=True)
        ]
        whole = dict(enumerate(needed[self.labels :], self.labels))
        room = width - 1 - sum(min(needed[j], _LABEL) + 3 for j in labels)
        part: list[int] = []
        for j in whole:
            if part and sum(whole[i] + 3 for i in [*part, j]) > room:
                yield labels + part, whole
                part = []
            part.append(j)
        yield labels + part, whole

    def markdown(self) -> str:
        """Returns the title and table in Markdown, ending in a newline."""
        rule = ["---" if i < self.labels else "---:" for i in range(len(self.header))]
        cells = [
            [f"**{escaped(cell)}**" if (i, j) in self.best else escaped(cell) for j, cell in row]
            for i, row in enumerate(map(enumerate, self.rows))
        ]
        lines = [[*map(escaped, self.header)], rule, *cells]
        title = f"**{escaped(self.title)}**\n\n" if self.title else ""
        return title + "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def escaped(text: str) -> str:
    """Escapes a text for a cell of a Markdown table: on one line, and without markup."""
    text = " ".join(text.split("\n"))
    return re.sub(r"[|<>&*`~[\]]|\\(?=[^\w\s])|(?<!\w)_|_(?!\w)", r"\\\g<0>", text)


def by_stage(
    title: str,
    runs: Sequence[Stages],
    figures: Iterable[Figure],
    header: Sequence[str] = (),
    more: Callable[[Figure], list[str]] = lambda figure: [],
    best: Callable[[Figure], Iterable[int]] = lambda figure: (),
) -> Table:
    """Makes a table with a row for each figure, a column for each stage, and the columns `header`.

    Args:
        more: returns a figure's cells under `header`.
        best: returns the indices, in `stages_of(runs)`, of the stages to highlight for a figure.
    """
    names, rows, marked = stages_of(runs), [], set()
    for figure in figures:
        if any(stage.get(figure.key) is not None for run in runs for stage in run.values()):
            marked |= {(len(rows), 1 + j) for j in best(figure)}
            means = [mean(figure, of(name, runs)) for name in names]
            rows.append([figure.title, *means, *more(figure)])
    return Table(title, ["", *names, *header], rows, best=frozenset(marked))


def of_runs(results: Sequence[Results], title: str = "") -> Table:
    """Makes a table of the stages of one configuration, over its seeds; a missing figure is "-".
    The title counts the seeds in which the student's primary figure is better than the
    baseline's."""
    runs, who = [each["stages"] for each in results], roles(results[0])
    both, good = [run for run in runs if {who.student, who.baseline} <= {*run}], quality_of(results)
    if len(runs) > 1:
        title += f", {len(runs)} seeds: mean ± standard deviation"
    if len(both) > 1:
        primary = primary_of(results)
        direction = "higher" if primary.better > 0 else "lower"
        title += ", differences ± standard error"
        if (wins := differences(primary, results)[2]) != MISSING:
            title += f"; {who.student}'s {primary.key} {direction} in {wins}"
    header = [f"{who.student} - {who.baseline}"] if both else []

    def difference(figure: Figure) -> list[str]:
        return [differences(figure, results)[0] if figure in good else ""] if both else []

    return by_stage(title, runs, good + quantities.cost(runs), header, difference)


def of_groups(groups: Mapping[str, Sequence[Results]]) -> Table:
    """Makes a table with a row for each configuration: the primary figure of teacher, baseline and
    student, and the paired difference. The best student is highlighted if it is significantly
    better than all others at the same seeds."""
    everything = [run for results in groups.values() for run in results]
    figure, who = primary_of(everything), dataclasses.astuple(roles(everything[0]))
    names = [name for name in who if any(name in run["stages"] for run in everything)]
    rows, students = [], {}
    for label, results in groups.items():
        means = [mean(figure, of(name, [run["stages"] for run in results])) for name in names]
        rows.append([label, str(len(results)), *means, *differences(figure, results)])
        for run in results:
            if (student := roles(run).student) in run["stages"]:
                students.setdefault(run["seed"], {})[label] = run["stages"][student]
    best = quantities.shown_best(figure, [*groups], students.values())
    header = ["configuration", "seeds", *names, "student − baseline", *SPREAD]
    title = f"{figure.title} of all configurations" + "; bold: the best student" * bool(best)
    return Table(title, header, rows, best=frozenset((row, 1 + len(names)) for row in best))


def primary_of(results: Sequence[Results]) -> Figure:
    """Finds the primary figure of these runs; raises UserError if no stage has it."""
    found = {figure.key: figure for figure in quality_of(results)}
    key = results[0].get("primary", "loss")
    if key not in found:
        have = ", ".join(found) or "none"
        raise UserError(f"results.json: primary={key!r}, but no stage has that figure: have {have}")
    return found[key]


def quality_of(results: Iterable[Results]) -> list[Figure]:
    """Lists the metrics of quality in these runs."""
    return quantities.quality(run["stages"] for run in results)


def differences(figure: Figure, results: Sequence[Results]) -> list[str]:
    """Formats the paired difference student - baseline, its interval, and the number of seeds in
    which the student is better."""
    who, stages = roles(results[0]), [run["stages"] for run in results]
    found = quantities.compare_stages(figure, who.student, who.baseline, stages)
    if found is None:
        return [MISSING] * 3
    return [found.show(), found.show_interval(), f"{found.wins} of {len(found.differences)}"]
