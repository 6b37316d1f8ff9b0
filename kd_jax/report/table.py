"""Tables of figures, printed with rich or written as Markdown.

`of_runs` shows one configuration: a row for each figure, a column for each stage, and the
difference student - baseline, paired by seed. `of_groups` puts configurations under each other by
their primary figure.
Several seeds are shown as mean ± sample standard deviation, their differences as mean ± standard
error. The primary figure is the one by which a run selects checkpoints and is compared: the loss of
a language model, a task's own metric otherwise.
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
                name = Text(self.header[j])
                table.add_column(name, justify=justify, overflow="fold", width=width)
            for row in self.rows:
                if any(row[j] for j in columns[self.labels :] or columns):
                    table.add_row(*(Text(row[j]) for j in columns))
            console.print(table)

    def _parts(self, width: int) -> Iterator[tuple[list[int], dict[int, int]]]:
        """Gives the columns that fit next to each other, each time after the labels, and the widths
        of those that must not be wrapped: a figure is never broken, a heading between its words."""
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
        """Writes the title and a Markdown table, ending in a newline."""
        rule = ["---" if i < self.labels else "---:" for i in range(len(self.header))]
        cells = [
            [f"**{escaped(cell)}**" if (i, j) in self.best else escaped(cell) for j, cell in row]
            for i, row in enumerate(map(enumerate, self.rows))
        ]
        lines = [[*map(escaped, self.header)], rule, *cells]
        title = f"**{escaped(self.title)}**\n\n" if self.title else ""
        return title + "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def escaped(text: str) -> str:
    """Writes a text as Markdown, in one line: nothing in it is markup, or the end of a cell."""
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


def of_runs(results: Sequence[Results], title: str = "") -> Table:
    """Shows the stages of one configuration, over its seeds; what a stage lacks (or None) is "-".
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
    """Shows the primary figure of configurations, a row each: of teacher, baseline and student, and
    the paired difference. The best student stands out, if it is shown to be better than all others
    at the same seeds."""
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
    """Finds the primary figure of these runs; raises UserError where no stage has it."""
    found = {figure.key: figure for figure in quality_of(results)}
    key = results[0].get("primary", "loss")
    if key not in found:
        have = ", ".join(found) or "none"
        raise UserError(f"results.json: primary={key!r}, but no stage has that figure: have {have}")
    return found[key]


def quality_of(results: Iterable[Results]) -> list[Figure]:
    """Lists the figures of quality that these runs have."""
    return quantities.quality(run["stages"] for run in results)


def differences(figure: Figure, results: Sequence[Results]) -> list[str]:
    """Shows the paired difference student - baseline, its interval, and in how many seeds the
    student is better."""
    who, stages = roles(results[0]), [run["stages"] for run in results]
    found = quantities.compare_stages(figure, who.student, who.baseline, stages)
    if found is None:
        return [MISSING] * 3
    return [found.show(), found.show_interval(), f"{found.wins} of {len(found.differences)}"]
