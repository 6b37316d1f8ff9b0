"""Matrices as pictures: the confusion matrix of a classifier, the heat map of a sweep."""

import math
from collections.abc import Sequence

import matplotlib
import numpy as np
from etils import epath
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from kd_jax.evals.plots import COLOURS, STYLE

BLUES = LinearSegmentedColormap.from_list("blues", ["#f7fafc", COLOURS[0]])
MOST_NOTES = 25  # rows or columns beyond which cells carry no numbers


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
    return _draw(share, notes, names, names, path, title, ("true class", "predicted class"), None)


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
    return _draw(values, notes, rows, columns, path, title, labels[:2], best, labels[2])


def _draw(values, notes, rows, columns, path, title, labels, best, bar="") -> str:
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        size = (2.2 + 0.75 * len(columns) + 0.8 * bool(bar), 1.6 + 0.5 * len(rows))
        figure = Figure(figsize=[min(max(side, 3.2), 16.0) for side in size], layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(values, cmap=BLUES, aspect="auto")
        axes.set_title(title)
        axes.set_ylabel(labels[0])
        axes.set_xlabel(labels[1])
        axes.set_yticks(range(len(rows)), rows)
        long = max(map(len, columns), default=0) > 8
        turn = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if long else {}
        axes.set_xticks(range(len(columns)), columns, **turn)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        if max(len(rows), len(columns)) <= MOST_NOTES:
            for (i, j), value in np.ndenumerate(values):
                dark = np.isfinite(value) and image.norm(value) > 0.55
                ink = "white" if dark else "#222222"
                axes.text(j, i, notes[i][j], ha="center", va="center", color=ink)
        if best is not None:
            corner = (best[1] - 0.5, best[0] - 0.5)
            frame = Rectangle(corner, 1, 1, fill=False, ec=COLOURS[4], lw=2.5, clip_on=False)
            axes.add_patch(frame)
        if bar:
            figure.colorbar(image, label=bar).outline.set_visible(False)
        path = epath.Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            figure.savefig(file, format="png", dpi=130)
    return str(path)
