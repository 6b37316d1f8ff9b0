"""Quality against cost: a point for each stage of each configuration."""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from etils import epath
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing
from matplotlib.ticker import EngFormatter

from kd_jax.evals import plots
from kd_jax.evals.quantities import COST, Figure, Stages
from kd_jax.evals.table import stages_of

AXES = ("size_mb", "latency_ms", "flops_per_sample")
MARKERS = {"teacher": "s", "baseline": "D", "student": "o"}


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
        axes.set_xlabel(self.cost.title)
        axes.set_ylabel(f"{self.quality.title}, {good} is better")
        axes.xaxis.set_major_formatter(EngFormatter())
        axes.margins(0.12)
        return handles

    def keys(self) -> list[plots.Key]:
        return [plots.Key(p.label, p.colour, marker=p.marker) for p in self.points]

    def describe(self) -> str:
        """What somebody who does not see it should know."""
        shown = (
            f"{p.label} {self.quality.show(p.y)} at {self.cost.show(p.x)}" for p in self.points
        )
        return f"{self.quality.title} over {self.cost.title}: {', '.join(shown)}"


def scatters(groups: Mapping[str, Sequence[Stages]], quality: Figure) -> list[Scatter]:
    """Quality over every cost of AXES in which the models differ."""
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
            found = [run[stage] for run in runs if stage in run]
            xs = [stage.get(cost.key) for stage in found]
            ys = [stage.get(quality.key) for stage in found]
            if None in xs or None in ys:
                continue
            look = plots.look(group, i, stage, j, len(groups))
            points.append(
                Point(
                    label=look.label,
                    colour=look.colour,
                    marker=MARKERS.get(stage, "^"),
                    x=statistics.fmean(xs),
                    y=statistics.fmean(ys),
                    spread=statistics.stdev(ys) if len(ys) > 1 else 0.0,
                )
            )
    return points


def save(found: Sequence[Scatter], path: epath.PathLike) -> None:
    """Writes a PNG of them beside each other."""
    with matplotlib.rc_context(plots.STYLE):
        figure = Drawing(figsize=(4.2 * len(found), 3.6), layout="constrained")
        handles: dict[str, Any] = {}
        for axes, scatter in zip(
            figure.subplots(1, len(found), squeeze=False).flat, found, strict=True
        ):
            handles |= scatter.draw(axes)
        rows = math.ceil(len(handles) / 4)
        figure.set_figheight(3.3 + 0.2 * rows)
        figure.legend(
            handles.values(), handles.keys(), loc="outside lower left", ncols=min(4, len(handles))
        )
        with epath.Path(path).open("wb") as file:
            figure.savefig(file, format="png", dpi=130)
