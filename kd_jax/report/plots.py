"""Training and validation curves, of the stages of one run or of several runs over each other.

`draw` takes groups: runs that differ only in their seed, under one label. A line is the mean over
the group, the band around it one standard deviation. With one group the colours tell the stages
apart, with several the colours tell the groups and the dashes the stages.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import matplotlib
import numpy as np
from etils import epath
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

from kd_jax.report.runs import Columns, Curves, distillation_ratio, ordered

# Okabe and Ito's colours, which colour-blind people can tell apart.
STAGE_COLOURS = {"teacher": "#666666", "baseline": "#E69F00", "student": "#0072B2"}
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000")
DASHES = {"teacher": ":", "baseline": "--", "student": "-"}

NATS = "nats / {unit}"  # token or example, see `_unit`
SHARE = "share of {unit}s"
# Titles and units of the columns that have their own; any other column is a term of the loss.
TITLES = {
    "loss": ("total loss (weighted sum of terms)", ""),
    "kl_t1": ("KL(teacher ‖ student) at T = 1", NATS),
    "teacher_outside": ("teacher's probability of ids that are not shared", "share"),
    "grad_norm": ("norm of the gradient", ""),
    "learning_rate": ("learning rate", ""),
    "ratio": ("distillation terms / label term, weighted", ""),
    "ce": ("cross-entropy", NATS),
    "mse": ("squared error", ""),
    "kl": ("KL(teacher ‖ student), softened", NATS),
    "reverse_kl": ("KL(student ‖ teacher), softened", NATS),
    "jsd": ("Jensen-Shannon divergence", NATS),
}
VALIDATION_TITLES = {
    "loss": ("loss on the labels", NATS),
    "perplexity": ("perplexity", ""),
    "accuracy": ("accuracy", SHARE),
    "f1": ("F1", ""),
    "macro_f1": ("macro F1", ""),
    "matthews_correlation": ("Matthews correlation", ""),
    "pearson": ("Pearson correlation", ""),
    "spearman": ("Spearman correlation", ""),
    "exact_match": ("exact match", "percent"),
    "kl": ("KL(teacher ‖ student) at T = 1", NATS),
    "agreement": ("top-1 agreement with the teacher", SHARE),
}
KINDS = {"training": ("Training", TITLES), "validation": ("Validation", VALIDATION_TITLES)}
# The columns that follow the terms.
LAST = ("ratio", "kl_t1", "teacher_outside", "grad_norm", "learning_rate")
SMOOTH = 50  # a noisy curve is averaged over 1 / SMOOTH of its length
_HIDES, _WIDER = 1e-3, 2.0  # relative difference that is not seen; of widths of lines, in points
POINTS = 400  # a line has no more of them, so that a long run makes no large file

STYLE = {
    "axes.edgecolor": "#999999",
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "figure.titlesize": 12,
    "font.size": 9,
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
    "lines.linewidth": 1.6,
}


@dataclasses.dataclass(frozen=True)
class Line:
    """One stage of one group: a curve for every run."""

    label: str
    colour: str
    dash: str
    runs: list[tuple[np.ndarray, np.ndarray]]  # (steps, values)


@dataclasses.dataclass(frozen=True)
class Panel:
    """One column of the csv files: what one pair of axes shows."""

    title: str
    unit: str
    lines: list[Line]
    noisy: bool  # smoothed, the values themselves behind
    linear: bool = False  # never on a logarithmic scale
    over: str = "steps"

    def draw(self, axes: Axes) -> dict[str, Any]:
        """Fills the axes; returns the handles of the legend by label."""
        handles = {}
        for i, line in enumerate(self.lines):
            over = sum(_same(line, other) for other in self.lines[i + 1 :])
            handles[line.label] = _plot(axes, line, self.noisy, over)
        _finish(axes, self)
        return handles

    def keys(self) -> list[Line]:
        """Lists what a legend explains."""
        return self.lines

    def describe(self) -> str:
        """Says what somebody who does not see it should know."""
        ends = (np.mean([values[-1] for _, values in line.runs]) for line in self.lines)
        last = (f"{line.label} {end:.4g}" for line, end in zip(self.lines, ends, strict=True))
        unit = f", {self.unit}" if self.unit else ""
        same = [
            f"; {one.label} and {other.label} are the same"
            for i, one in enumerate(self.lines)
            for other in self.lines[i + 1 :]
            if _same(one, other)
        ]
        said = f"{self.title}{unit}, over the {self.over}; last values: {', '.join(last)}"
        return said + "".join(same)


class Drawn(Protocol):
    """What stands on a sheet: curves, or points."""

    title: str

    def draw(self, axes: Axes) -> dict[str, Any]: ...


Groups = Mapping[str, Sequence[Mapping[str, Curves]]]  # curves by stage of the runs of each group


def draw(groups: Groups, out: epath.PathLike) -> list[str]:
    """Writes out/training.png and out/validation.png, where there is something to draw.

    Args:
      groups: for each label, the curves of its runs (`runs.curves`), by stage.
      out: the folder, made if missing.

    Returns:
      The paths of the files written.
    """
    out = epath.Path(out)
    out.mkdir(parents=True, exist_ok=True)
    subject = next(iter(groups)) if len(groups) == 1 else f"{len(groups)} configurations"
    return [
        save(sheet(list(found.values()), f"{title}: {subject}"), out / f"{kind}.png")
        for kind, (title, _) in KINDS.items()
        if (found := panels(groups, kind))
    ]


def save(figure: Figure, path: epath.PathLike) -> str:
    """Writes a PNG, whose folder is made if missing, and returns its path."""
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE), path.open("wb") as file:
        figure.savefig(file, format="png", dpi=130)
    return str(path)


def sheet(found: Sequence[Drawn], title: str = "") -> Figure:
    """Draws panels beside each other, three in a row, over one legend."""
    with matplotlib.rc_context(STYLE):
        wide, high = min(len(found), 3), math.ceil(len(found) / 3)
        figure = Figure(layout="constrained")
        if title:
            figure.suptitle(title, x=0.01, ha="left", weight="bold")
        grid = figure.subplots(high, wide, squeeze=False)
        handles: dict[str, Any] = {}
        for axes, panel in zip(grid.flat, found, strict=False):
            for label, handle in panel.draw(axes).items():
                handles.setdefault(label, handle)
            axes.set_title(panel.title)
        for axes in grid.flat[len(found) :]:
            axes.set_visible(False)
        lines = math.ceil(len(handles) / 4)
        figure.set_size_inches(4.2 * wide, 3.0 * high + 0.5 + 0.2 * bool(title) + 0.2 * lines)
        figure.legend(
            handles.values(), handles.keys(), loc="outside lower left", ncols=min(4, len(handles))
        )
        return figure


def panels(groups: Groups, kind: str) -> dict[str, Panel]:
    """Makes a panel for every column with values: loss first, then the terms, then LAST.

    Args:
      groups: see `draw`.
      kind: training | validation.
    """
    columns: dict[str, None] = {}
    for curves in (curves for runs in groups.values() for curves in runs):
        for stage in curves.values():
            columns.update(dict.fromkeys(_columns(stage, kind)))
    names = [name for name in columns if name not in ("step", *LAST)]
    names = [name for name in names if not name.endswith("_weighted")]
    names += [name for name in LAST if name in columns]
    unit, found = _unit(groups), {}
    for name in names:
        if lines := _lines(groups, kind, name):
            title, of = KINDS[kind][1].get(name, (name.replace("_", " "), ""))
            schedule = name == "learning_rate"
            noisy = kind == "training" and not schedule
            found[name] = Panel(title, of.format(unit=unit), lines, noisy, schedule or of == SHARE)
    return found


def _unit(groups: Groups) -> str:
    """What a loss is averaged over: tokens where there is a perplexity, otherwise examples."""
    stages = [stage for runs in groups.values() for curves in runs for stage in curves.values()]
    classes = any(stage.validation and "perplexity" not in stage.validation for stage in stages)
    return "example" if classes else "token"


def _columns(curves: Curves, kind: str) -> Columns:
    """The columns of a stage; those of training with the ratio of teacher to labels."""
    found = getattr(curves, kind)
    ratio = None if kind == "validation" else distillation_ratio(found)
    return found if ratio is None else found | {"ratio": ratio}


def _lines(groups, kind: str, name: str) -> list[Line]:
    lines = []
    for i, (group, runs) in enumerate(groups.items()):
        stages = ordered({stage for curves in runs for stage in curves})
        for j, stage in enumerate(stages):
            found = [_values(_columns(c[stage], kind), name) for c in runs if stage in c]
            found = [(steps, values) for steps, values in found if len(steps)]
            if not found:
                continue
            lines.append(dataclasses.replace(look(group, i, stage, j, len(groups)), runs=found))
    return lines


def look(group: str, i: int, stage: str, j: int, groups: int) -> Line:
    """Chooses label, colour and dash of the j-th stage of the i-th of several groups."""
    own_colour = STAGE_COLOURS.get(stage, COLOURS[(j + 2) % len(COLOURS)])
    return Line(
        label=stage if groups == 1 else f"{group} · {stage}",
        colour=own_colour if groups == 1 else COLOURS[i % len(COLOURS)],
        dash="-" if groups == 1 else DASHES.get(stage, "-."),
        runs=[],
    )


def _values(columns: Columns, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the rows that have a finite value."""
    if name not in columns:
        return np.empty(0), np.empty(0)
    good = np.isfinite(columns[name])
    return columns["step"][good], columns[name][good]


def smooth(values: np.ndarray) -> np.ndarray:
    """Takes the centred mean over 1 / SMOOTH of the curve; narrower at both ends, so unbiased."""
    half = len(values) // SMOOTH // 2
    if half == 0:
        return values
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    reach = np.minimum(half, np.minimum(index, len(values) - 1 - index))
    return (total[index + reach + 1] - total[index - reach]) / (2 * reach + 1)


def _same(one: Line, other: Line) -> bool:
    """Whether the later of two lines would hide the other."""
    return len(one.runs) == len(other.runs) and all(
        np.array_equal(a[0], b[0]) and np.allclose(a[1], b[1], rtol=_HIDES, atol=0.0)
        for a, b in zip(one.runs, other.runs, strict=True)
    )


def _plot(axes: Axes, line: Line, noisy: bool, over: int):
    """Draws the mean curve, so wide that it is seen beneath `over` others of the same values, and
    what is around it; returns the handle for the legend."""
    style = {"color": line.colour, "linestyle": line.dash}
    style["linewidth"] = STYLE["lines.linewidth"] + _WIDER * over
    few = max(len(steps) for steps, _ in line.runs) <= 50
    marker = {"marker": "o", "markersize": 3} if few and not noisy else {}
    curves = [_thin(steps, smooth(values) if noisy else values) for steps, values in line.runs]
    steps = curves[0][0]
    if not all(np.array_equal(steps, other) for other, _ in curves):
        return [axes.plot(*curve, **style, **marker)[0] for curve in curves][0]
    if noisy and len(curves) == 1:
        axes.plot(*_thin(*line.runs[0]), color=line.colour, alpha=0.2, linewidth=0.8)
    values = np.stack([values for _, values in curves])
    mean = values.mean(axis=0)
    if len(curves) > 1:
        spread = values.std(axis=0, ddof=1)
        axes.fill_between(steps, mean - spread, mean + spread, color=line.colour, alpha=0.15, lw=0)
    return axes.plot(steps, mean, **style, **marker)[0]


def _thin(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most POINTS of the points, evenly; the first and the last stay."""
    if len(steps) <= POINTS:
        return steps, values
    kept = np.linspace(0, len(steps) - 1, POINTS).round().astype(int)
    return steps[kept], values[kept]


def _finish(axes: Axes, panel: Panel) -> None:
    """Units and scales: logarithmic where values span more than a factor of 4."""
    axes.set_xlabel(panel.over)
    axes.set_ylabel(panel.unit)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    values = np.concatenate([values for line in panel.lines for _, values in line.runs])
    if not panel.linear and values.min() > 0 and values.max() > 4 * values.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: _minor_label(value)))


def _minor_label(value: float) -> str:
    """Labels 2, 3, 5, 20, ... between the powers of ten of a logarithmic axis."""
    leading = round(value / 10 ** math.floor(math.log10(value)))
    return f"{value:g}" if leading in (2, 3, 5) else ""
