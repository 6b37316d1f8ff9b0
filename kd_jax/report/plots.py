"""Draws panels of curves and points: training and validation of the stages of one or several runs
in the same axes, and quality against cost.

Groups are runs that differ only in their seed, under one label. A line is the mean over the group,
the band around it one standard deviation. With one group the colours tell the stages apart, with
several the colours tell the groups, and dashes and markers the stages.
"""

import base64
import dataclasses
import io
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from etils import epath
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

from kd_jax.report import quantities, table
from kd_jax.report.runs import Columns, Curves, Results, Roles, distillation_ratio, ordered, roles

# Okabe and Ito's colours, which colour-blind people can tell apart.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000")
TEACHER, BASELINE, STUDENT = "#666666", COLOURS[1], COLOURS[0]
# Colour, dash and marker of a role; other stages have the colours after the first two.
LOOKS = {
    "teacher": (TEACHER, ":", "s"),
    "baseline": (BASELINE, "--", "D"),
    "student": (STUDENT, "-", "o"),
}

NATS = "nats / {row}"  # a row is a token or an example
# Titles and units of the columns of training that have their own; any other is a term's name.
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
KINDS = ("training", "validation")
FILES = {
    "training.png": "Training",
    "validation.png": "Validation",
    "trade_off.png": "Quality against cost",
}
COSTS = ("size_mb", "latency_ms", "flops_per_sample")  # that quality is set against
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
    "svg.fonttype": "none",
}


@dataclasses.dataclass(frozen=True)
class Line:
    """One stage of one group: a curve for every run; with a marker, a point for every run."""

    label: str
    colour: str
    dash: str
    runs: list[tuple[np.ndarray, np.ndarray]]  # (steps, values)
    marker: str = ""

    def end(self) -> tuple[float, float]:
        """Returns the last (step, value) of the line, the mean over its runs."""
        return tuple(float(np.mean([run[i][-1] for run in self.runs])) for i in range(2))


@dataclasses.dataclass(frozen=True)
class Panel:
    """The contents of one pair of axes: a column of the csv files, or a metric against a cost."""

    title: str
    unit: str
    lines: list[Line]
    noisy: bool = False  # smoothed, the values themselves behind
    linear: bool = False  # never on a logarithmic scale
    over: str = "steps"

    def draw(self, axes: Axes) -> dict[str, Any]:
        """Draws the lines into the axes; returns the legend's handles by label."""
        handles = {}
        for i, line in enumerate(self.lines):
            over = sum(_same(line, other) for other in self.lines[i + 1 :])
            draw = _point if line.marker else _curve
            handles[line.label] = draw(axes, line, self.noisy, over)
        _finish(axes, self)
        return handles

    def describe(self) -> str:
        """Describes the panel in words, for readers who cannot see it."""
        lines, unit = self.lines, f", {self.unit}" if self.unit else ""
        ends = [(line, *line.end()) for line in lines]
        last = [f"{n.label} {y:.4g}" + (f" at {x:.4g}" if n.marker else "") for n, x, y in ends]
        same = [
            f"; {one.label} and {other.label} are the same"
            for i, one in enumerate(lines)
            for other in lines[i + 1 :]
            if _same(one, other)
        ]
        said = f"{self.title}{unit}, over the {self.over}; last values: {', '.join(last)}"
        return said + "".join(same)


# For each label, results and curves (`runs.curves`, by stage) of its runs.
Groups = Mapping[str, Sequence[tuple[Results, Mapping[str, Curves]]]]
Pictures = Mapping[str, Sequence[Panel]]  # the panels of each of FILES that has any


def curves(groups: Groups) -> Pictures:
    """Makes the pictures of training and validation; pictures without values are left out."""
    found = {f"{kind}.png": [*panels(groups, kind).values()] for kind in KINDS}
    return {file: panels for file, panels in found.items() if panels}


def draw(pictures: Pictures, subject: str, out: epath.PathLike) -> list[str]:
    """Writes pictures into the folder `out`, made if missing; returns their paths."""
    return [
        save(sheet(panels, f"{FILES[file]}: {subject}"), epath.Path(out) / file)
        for file, panels in pictures.items()
    ]


def save(figure: Figure, path: epath.PathLike) -> str:
    """Writes a PNG, whose folder is made if missing, and returns its path."""
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE), path.open("wb") as file:
        figure.savefig(file, format="png", dpi=130)
    return str(path)


def sheet(found: Sequence[Panel], title: str = "") -> Figure:
    """Draws panels into one figure, three in a row, above a common legend."""
    with matplotlib.rc_context(STYLE):
        wide, high = min(len(found), 3), math.ceil(len(found) / 3)
        figure = Figure(layout="constrained")
        if title:
            figure.suptitle(title, x=0.01, ha="left", weight="bold")
        grid = figure.subplots(high, wide, squeeze=False)
        handles: dict[str, Any] = {}
        for axes, panel in zip(grid.flat, found, strict=False):
            handles |= panel.draw(axes)
        for axes in grid.flat[len(found) :]:
            axes.set_visible(False)
        lines = math.ceil(len(handles) / 4)
        figure.set_size_inches(4.2 * wide, 3.0 * high + 0.5 + 0.2 * bool(title) + 0.2 * lines)
        figure.legend(
            handles.values(), handles.keys(), loc="outside lower left", ncols=min(4, len(handles))
        )
        return figure


def images(found: Sequence[Panel]) -> list[tuple[str, str]]:
    """Draws each panel, and their legend, as an SVG image without background and with selectable
    text: (data URI, description) of each."""
    drawn = []
    with matplotlib.rc_context(STYLE):
        handles: dict[str, Any] = {}
        for panel in found:
            figure = Figure(figsize=(4.2, 3.0), layout="constrained")
            axes = figure.subplots()
            handles |= panel.draw(axes)
            drawn.append((_svg(figure, panel.title), panel.describe()))
        legend = Figure(figsize=(4.2, 0.2 + 0.2 * len(handles)))
        legend.legend(handles.values(), handles.keys(), loc="upper left")
        drawn.append((_svg(legend, "legend"), f"legend: {', '.join(handles)}"))
    return drawn


def _svg(figure: Figure, salt: str) -> str:
    """Converts a figure to a data URI of an SVG, with coordinates rounded to a hundredth."""
    file = io.BytesIO()
    # Elements of two pictures must not share ids.
    with matplotlib.rc_context({"svg.hashsalt": salt}):
        metadata = {"Date": None, "Creator": None}
        figure.savefig(file, format="svg", metadata=metadata, transparent=True)
    text = file.getvalue().decode()
    text = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), text)
    return "data:image/svg+xml;base64," + base64.b64encode(text.encode()).decode()


def panels(groups: Groups, kind: str) -> dict[str, Panel]:
    """Makes a panel for every column with values: loss first, then the terms, then LAST.

    Args:
        groups: see `curves`.
        kind: training | validation.
    """
    stages = [stage for runs in groups.values() for _, curves in runs for stage in curves.values()]
    columns = dict.fromkeys(name for stage in stages for name in _columns(stage, kind))
    names = [n for n in columns if n not in ("step", *LAST) and not n.endswith("_weighted")]
    names += [name for name in LAST if name in columns]
    held_out = {name: 0 for stage in stages for name in stage.validation} or {"perplexity": 0}
    row, found = "token" if "perplexity" in held_out else "example", {}
    figures = {f.key: f for f in quantities.of_keys(held_out)} if kind == "validation" else {}
    for name in names:
        if not (lines := _lines(groups, kind, name)):
            continue
        title, unit = TITLES.get(name, (name.replace("_", " "), ""))
        linear, noisy = name == "learning_rate", kind == "training" and name != "learning_rate"
        if figure := figures.get(name):
            title, unit, linear = figure.name, figure.unit, figure.better > 0
        found[name] = Panel(title, unit.format(row=row), lines, noisy, linear)
    return found


def _columns(curves: Curves, kind: str) -> Columns:
    """Returns the columns of a stage; for training, with the ratio of the teacher's terms to the
    labels'."""
    found = getattr(curves, kind)
    ratio = None if kind == "validation" else distillation_ratio(found)
    return found if ratio is None else found | {"ratio": ratio}


def _lines(groups: Groups, kind: str, name: str) -> list[Line]:
    lines = []
    for i, (group, runs) in enumerate(groups.items()):
        for j, stage in enumerate(ordered({stage for _, curves in runs for stage in curves})):
            found = [_values(_columns(c[stage], kind), name) for _, c in runs if stage in c]
            found = [(steps, values) for steps, values in found if len(steps)]
            if found:
                look = _look(group, i, stage, j, len(groups), roles(runs[0][0]))
                lines.append(dataclasses.replace(look, runs=found, marker=""))
    return lines


def _look(group: str, i: int, stage: str, j: int, groups: int, who: Roles) -> Line:
    """Chooses label, color, dash and marker for the j-th stage of the i-th group."""
    other = COLOURS[(j + 2) % len(COLOURS)], "-.", "^"
    by_name = {getattr(who, role): look for role, look in LOOKS.items()}
    colour, dash, marker = by_name.get(stage, other)
    if groups == 1:
        return Line(stage, colour, "-", [], marker)
    return Line(f"{group} · {stage}", COLOURS[i % len(COLOURS)], dash, [], marker)


def _values(columns: Columns, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the steps and values of the rows that have a finite value."""
    if name not in columns:
        return np.empty(0), np.empty(0)
    good = np.isfinite(columns[name])
    return columns["step"][good], columns[name][good]


def trade_off(groups: Groups) -> Pictures:
    """Plots the primary metric against each of COSTS in which the models differ."""
    everything = [results for runs in groups.values() for results, _ in runs]
    quality = table.primary_of(everything)
    good, found = "higher" if quality.better > 0 else "lower", []
    for cost in (figure for key in COSTS for figure in quantities.COST if figure.key == key):
        lines = _points(groups, cost, quality)
        if len({line.end()[0] for line in lines}) > 1:
            title, unit = f"Quality against {cost.title}", f"{quality.title}, {good} is better"
            found.append(Panel(title, unit, lines, linear=True, over=cost.title))
    return {"trade_off.png": found} if found else {}


def _points(groups: Groups, cost: quantities.Figure, quality: quantities.Figure) -> list[Line]:
    lines = []
    for i, (group, members) in enumerate(groups.items()):
        runs = [results["stages"] for results, _ in members]
        for j, stage in enumerate(quantities.stages_of(runs)):
            xs, ys = (
                [each.get(f.key) for each in quantities.of(stage, runs)] for f in (cost, quality)
            )
            if None not in xs + ys:
                look = _look(group, i, stage, j, len(groups), roles(members[0][0]))
                points = [(np.array([x]), np.array([y])) for x, y in zip(xs, ys, strict=True)]
                lines.append(dataclasses.replace(look, runs=points))
    return lines


def smooth(values: np.ndarray) -> np.ndarray:
    """Smooths a curve by a centered mean over 1 / SMOOTH of it, narrower at the ends."""
    half = len(values) // SMOOTH // 2
    if half == 0:
        return values
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    reach = np.minimum(half, np.minimum(index, len(values) - 1 - index))
    return (total[index + reach + 1] - total[index - reach]) / (2 * reach + 1)


def _same(one: Line, other: Line) -> bool:
    """Tells whether the later of two lines would hide the other."""
    return len(one.runs) == len(other.runs) and all(
        np.array_equal(a[0], b[0]) and np.allclose(a[1], b[1], rtol=_HIDES, atol=0.0)
        for a, b in zip(one.runs, other.runs, strict=True)
    )


def _point(axes: Axes, line: Line, noisy: bool, over: int):
    """Draws the mean of the runs' points and their spread, large enough to show beneath `over`
    points at the same place; returns the legend's handle."""
    values = [float(values[-1]) for _, values in line.runs]
    spread = statistics.stdev(values) if len(values) > 1 else None
    style = {"color": line.colour, "marker": line.marker, "markersize": 7 + 5 * over}
    return axes.errorbar(*line.end(), spread or None, capsize=3, linestyle="none", **style)


def _curve(axes: Axes, line: Line, noisy: bool, over: int):
    """Draws the mean curve and its spread, wide enough to show beneath `over` curves of the same
    values; returns the legend's handle."""
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
    """Thins a curve evenly to at most POINTS points; the first and last stay."""
    if len(steps) <= POINTS:
        return steps, values
    kept = np.linspace(0, len(steps) - 1, POINTS).round().astype(int)
    return steps[kept], values[kept]


def _finish(axes: Axes, panel: Panel) -> None:
    """Sets units and scales: logarithmic where values span more than a factor of 4."""
    axes.set(title=panel.title, xlabel=panel.over, ylabel=panel.unit)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if any(line.marker for line in panel.lines):
        axes.margins(0.12)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    values = np.concatenate([values for line in panel.lines for _, values in line.runs])
    if not panel.linear and values.min() > 0 and values.max() > 4 * values.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: _minor_label(value)))


def _minor_label(value: float) -> str:
    """Labels 2, 3, 5, 20, ... on a logarithmic axis, between the powers of ten."""
    leading = round(value / 10 ** math.floor(math.log10(value)))
    return f"{value:g}" if leading in (2, 3, 5) else ""
