"""Pictures beside the curves: confusion matrices, heat maps of sweeps, quality against cost; and
the rounds of a sequential ensemble, with their csv and what a still larger one may reach."""

import csv
import dataclasses
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import scipy.optimize
from etils import epath
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure as Drawing
from matplotlib.patches import Rectangle
from matplotlib.ticker import EngFormatter

from kd_jax import storage
from kd_jax.report import plots
from kd_jax.report.quantities import COST, Figure, Stages
from kd_jax.report.table import of, stages_of

BLUES = LinearSegmentedColormap.from_list("blues", ["#f7fafc", plots.COLOURS[0]])
MOST_NOTES = 25  # rows or columns beyond which cells carry no numbers
AXES = ("size_mb", "latency_ms", "flops_per_sample")
MARKERS = {"teacher": "s", "baseline": "D", "student": "o"}
# The first seven are those of slm_ensembles.
COLUMNS = (
    *("round", "teacher_eval_loss", "ensemble_eval_loss", "student_eval_loss", "ensemble_size"),
    *("round_duration_minutes", "total_elapsed_minutes", "ensemble_perplexity"),
    *("student_perplexity", "ensemble_kl", "student_kl", "ensemble_agreement"),
    *("student_agreement", "ensemble_parameters", "gain"),
)


def confusion_matrix(
    names: Sequence[str], counts: Sequence[Sequence[int]], path: epath.PathLike, title: str = ""
) -> str:
    """Writes a PNG: a row for each true class, a column for each predicted one.

    A cell shows its count; its colour is the share of the row, so that rare classes show too.

    Args:
      names: of the C classes.
      counts: (C, C) examples, [true][predicted].
      path: of the file; its folder is made if missing.

    Returns:
      The path.
    """
    counts = np.asarray(counts, float)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    notes = [[f"{value:,.0f}" for value in row] for row in counts]
    return _matrix(share, notes, names, names, path, title, ("true class", "predicted class"))


def heat_map(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float]],
    path: epath.PathLike,
    title: str = "",
    labels: tuple[str, str, str] = ("", "", ""),
    bigger_is_better: bool = True,
) -> str:
    """Writes a PNG of a figure over two settings; the best cell has a frame.

    Args:
      rows, columns: the values of the two settings, as they are shown.
      values: (R, C) the figure; NaN where nothing was run, which stays blank.
      path: of the file; its folder is made if missing.
      labels: names of the setting of the rows, that of the columns, and of the figure.

    Returns:
      The path.
    """
    values = np.asarray(values, float)
    best = None
    if np.isfinite(values).any():
        flat = np.nanargmax(values) if bigger_is_better else np.nanargmin(values)
        best = np.unravel_index(flat, values.shape)
    spread = np.ptp(values[np.isfinite(values)]) if best else 1.0
    digits = min(5, max(2, 2 - math.floor(math.log10(spread or 1.0))))
    notes = [[f"{x:.{digits}f}" if np.isfinite(x) else "" for x in row] for row in values]
    return _matrix(values, notes, rows, columns, path, title, labels[:2], best, labels[2])


def _matrix(values, notes, rows, columns, path, title, labels, best=None, bar="") -> str:
    with matplotlib.rc_context(plots.STYLE | {"axes.grid": False}):
        size = (2.2 + 0.75 * len(columns) + 0.8 * bool(bar), 1.6 + 0.5 * len(rows))
        figure = Drawing(figsize=[min(max(side, 3.2), 16.0) for side in size], layout="constrained")
        long = max(map(len, columns), default=0) > 8
        turn = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if long else {}
        axes = figure.subplots()
        image = axes.imshow(values, cmap=BLUES, aspect="auto")
        axes.set(title=title, ylabel=labels[0], xlabel=labels[1])
        axes.set_yticks(range(len(rows)), rows)
        axes.set_xticks(range(len(columns)), columns, **turn)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        if max(len(rows), len(columns)) <= MOST_NOTES:
            for (i, j), value in np.ndenumerate(values):
                dark = np.isfinite(value) and image.norm(value) > 0.55
                ink = "white" if dark else "#222222"
                axes.text(j, i, notes[i][j], ha="center", va="center", color=ink)
        if best is not None:
            style = {"fill": False, "ec": plots.COLOURS[4], "lw": 2.5, "clip_on": False}
            axes.add_patch(Rectangle((best[1] - 0.5, best[0] - 0.5), 1, 1, **style))
        if bar:
            figure.colorbar(image, label=bar).outline.set_visible(False)
    return plots.save(figure, path)


@dataclasses.dataclass(frozen=True)
class Point:
    """A stage over its seeds: means, and the spread of the quality."""

    label: str
    colour: str
    marker: str
    x: float
    y: float
    spread: float


@dataclasses.dataclass(frozen=True)
class Scatter:
    """Quality over one cost."""

    title: str
    cost: Figure
    quality: Figure
    points: list[Point]

    def draw(self, axes: Axes) -> dict[str, Any]:
        """Fills the axes; returns the handles of the legend by label."""
        handles = {}
        for i, p in enumerate(self.points):
            # So large that it is seen beneath those that lie on it.
            size = 7 + 5 * sum((p.x, p.y) == (q.x, q.y) for q in self.points[i + 1 :])
            style = {"color": p.colour, "marker": p.marker, "markersize": size, "linestyle": "none"}
            handles[p.label] = axes.errorbar(p.x, p.y, p.spread or None, capsize=3, **style)
        good = "higher" if self.quality.better > 0 else "lower"
        axes.set(xlabel=self.cost.title, ylabel=f"{self.quality.title}, {good} is better")
        axes.xaxis.set_major_formatter(EngFormatter())
        axes.margins(0.12)
        return handles

    def keys(self) -> list[Point]:
        """Lists what a legend explains."""
        return self.points

    def describe(self) -> str:
        """Says what somebody who does not see it should know."""
        shown = (
            f"{p.label} {self.quality.show(p.y)} at {self.cost.show(p.x)}" for p in self.points
        )
        return f"{self.quality.title} over {self.cost.title}: {', '.join(shown)}"


def scatters(groups: Mapping[str, Sequence[Stages]], quality: Figure) -> list[Scatter]:
    """Sets quality against every cost of AXES in which the models differ."""
    found = []
    for cost in (figure for key in AXES for figure in COST if figure.key == key):
        points = _points(groups, cost, quality)
        if len({point.x for point in points}) > 1:
            found.append(Scatter(f"Quality against {cost.title}", cost, quality, points))
    return found


def _points(groups, cost: Figure, quality: Figure) -> list[Point]:
    points = []
    for i, (group, runs) in enumerate(groups.items()):
        for j, stage in enumerate(stages_of(runs)):
            xs, ys = ([each.get(f.key) for each in of(stage, runs)] for f in (cost, quality))
            if None in xs or None in ys:
                continue
            look, marker = plots.look(group, i, stage, j, len(groups)), MARKERS.get(stage, "^")
            x, y = map(statistics.fmean, (xs, ys))
            spread = statistics.stdev(ys) if len(ys) > 1 else 0.0
            points.append(Point(look.label, look.colour, marker, x, y, spread))
    return points


@dataclasses.dataclass(frozen=True)
class Trend:
    """limit + slope / n over the sizes n of an ensemble, least squares, with standard errors.

    The expected loss of a mean of n alike members falls as 1 / n towards what they have in common
    (Krogh and Vedelsby 1995, for squared errors; to second order for others).
    """

    limit: float
    limit_error: float
    slope: float
    slope_error: float


def trend(sizes: list[int], values: list[float | None]) -> Trend | None:
    """Fits a Trend; None for fewer than three sizes, which leave nothing to tell the errors by, and
    where a value is missing."""
    if len(sizes) < 3 or None in values:
        return None
    (limit, slope), covariance = scipy.optimize.curve_fit(
        lambda n, limit, slope: limit + slope / n, np.asarray(sizes, float), values
    )
    errors = np.sqrt(np.diag(covariance))
    return Trend(float(limit), float(errors[0]), float(slope), float(errors[1]))


def write_rounds(
    folder: epath.Path, teacher: Mapping[str, Any], found: Sequence[Mapping[str, Any]]
) -> None:
    """Writes rounds.csv, a row for each round, beside its place and renames it; and rounds.png."""
    rows = _rows(teacher, found)
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    storage.write(folder / "rounds.csv", lambda file: file.write(text.getvalue().encode()))
    plots.save(plots.sheet(_panels(teacher, rows)), folder / "rounds.png")


def _rows(teacher, found) -> list[dict[str, Any]]:
    """A row a round. gain: by how much the ensemble's loss is lower than a round before."""
    rows, elapsed, before = [], 0.0, None
    for each in found:
        elapsed += each["minutes"]
        now = each["ensemble"]["loss"]
        row = {
            "round": each["round"],
            "teacher_eval_loss": teacher["loss"],
            "ensemble_size": each["members"],
            "round_duration_minutes": each["minutes"],
            "total_elapsed_minutes": round(elapsed, 2),
            "ensemble_parameters": each["ensemble"]["parameters"],
            "gain": "" if None in (before, now) else before - now,
        }
        for who in ("ensemble", "student"):
            row[f"{who}_eval_loss"] = each[who]["loss"]
            row |= {f"{who}_{key}": each[who][key] for key in ("perplexity", "kl", "agreement")}
        before = now
        rows.append(row)
    return rows


def _panels(teacher, rows) -> list[plots.Panel]:
    """Loss, KL and perplexity over the ensemble's size, and over its parameters."""
    panels = []
    for column, over in (("size", "members"), ("parameters", "parameters of all members")):
        x = np.array([row[f"ensemble_{column}"] for row in rows], float)
        for name, title in (
            ("eval_loss", "loss (nats / token)"),
            ("kl", "KL(teacher ‖ model) (nats / token)"),
            ("perplexity", "perplexity"),
        ):
            looks = (
                ("ensemble", "#0072B2", "-", [row[f"ensemble_{name}"] for row in rows]),
                ("last member alone", "#E69F00", "-", [row[f"student_{name}"] for row in rows]),
                ("teacher", "#666666", ":", [teacher.get(name.removeprefix("eval_"))] * len(rows)),
            )
            lines = [  # a missing value is None, and NaN as a number
                plots.Line(label, colour, dash, [(x, np.array(values, float))])
                for label, colour, dash, values in looks
                if (name, label) != ("kl", "teacher")
            ]
            panels.append(plots.Panel(title, "", lines, noisy=False, linear=True, over=over))
    return panels
