"""Draws confusion matrices, heat maps of sweeps, and the rounds of a sequential ensemble, with a
csv and an extrapolation to larger ensembles."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import scipy.optimize
from etils import epath
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from kd_jax import storage
from kd_jax.report import plots

BLUES = LinearSegmentedColormap.from_list("blues", ["#f7fafc", plots.COLOURS[0]])
MOST_NOTES = 25  # rows or columns beyond which cells carry no numbers


def confusion_matrix(
    names: Sequence[str], counts: Sequence[Sequence[int]], path: epath.PathLike, title: str = ""
) -> str:
    """Writes a PNG: a row for each true class, a column for each predicted one.

    A cell shows its count; its colour is the share of the row, so that rare classes show too.

    Args:
        names: names of the C classes.
        counts: (C, C) numbers of examples, [true][predicted].
        path: path of the file; its folder is made if missing.

    Returns:
        The path.
    """
    counts = np.asarray(counts, float)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    labels = ("true class", "predicted class", "")
    return heat_map(names, names, share, path, title, labels, 0, counts)


def heat_map(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float]],
    path: epath.PathLike,
    title: str = "",
    labels: tuple[str, str, str] = ("", "", ""),
    better: int = 1,
    counts: np.ndarray | None = None,
) -> str:
    """Writes a PNG of a metric over two settings; the best cell has a frame.

    Args:
        rows, columns: the values of the two settings, as text.
        values: (R, C) values of the metric; NaN, shown blank, where nothing was run.
        path: path of the file; its folder is made if missing.
        labels: names of the rows' setting, the columns' setting, and the metric.
        better: +1 if the biggest value is the best, -1 if the smallest is, 0 if none is.
        counts: (R, C) numbers to show in the cells instead of the metric.

    Returns:
        The path.
    """
    values, bar = np.asarray(values, float), labels[2]
    known = values[np.isfinite(values)]
    spread = np.ptp(known) if known.size else 0.0
    digits = min(5, max(2, 2 - math.floor(math.log10(spread or 1.0))))
    with matplotlib.rc_context(plots.STYLE | {"axes.grid": False}):
        size = (2.2 + 0.75 * len(columns) + 0.8 * bool(bar), 1.6 + 0.5 * len(rows))
        figure = Figure(figsize=[min(max(side, 3.2), 16.0) for side in size], layout="constrained")
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
                note = f"{value:.{digits}f}" if counts is None else f"{counts[i, j]:,.0f}"
                ink = "white" if np.isfinite(value) and image.norm(value) > 0.55 else "#222222"
                shown = note if np.isfinite(value) else ""
                axes.text(j, i, shown, ha="center", va="center", color=ink)
        if better and known.size:
            i, j = np.unravel_index(np.nanargmax(better * values), values.shape)
            style = {"fill": False, "ec": plots.COLOURS[4], "lw": 2.5, "clip_on": False}
            axes.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, **style))
        if bar:
            figure.colorbar(image, label=bar).outline.set_visible(False)
    return plots.save(figure, path)


def trend(sizes: Sequence[int], values: Sequence[float | None]) -> dict[str, float]:
    """Fits limit + slope / n to values at the sizes n of an ensemble, by least squares: {"limit",
    "slope", "limit_error", "slope_error"}, the errors being standard errors.

    The expected loss of the mean of n similar members falls as 1 / n towards the error that they
    share (Krogh and Vedelsby 1995, for squared errors; to second order for others). {} for fewer
    than three sizes, which leave no residuals to estimate errors from, and if a value is missing.
    """
    if len(sizes) < 3 or None in values:
        return {}
    found, covariance = scipy.optimize.curve_fit(
        lambda n, limit, slope: limit + slope / n, np.asarray(sizes, float), values
    )
    names = ("limit", "slope", "limit_error", "slope_error")
    numbers = (*found, *np.sqrt(np.diag(covariance)))
    return dict(zip(names, map(float, numbers), strict=True))


def write_rounds(
    folder: epath.Path, teacher: Mapping[str, Any], found: Sequence[Mapping[str, Any]]
) -> None:
    """Writes rounds.csv, a row for each round, and rounds.png."""
    rows = _rows(teacher, found)
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    storage.write(folder / "rounds.csv", lambda file: file.write(text.getvalue().encode()))
    plots.save(plots.sheet(_panels(teacher, rows)), folder / "rounds.png")


def _rows(teacher, found) -> list[dict[str, Any]]:
    """Makes a row for each round; `gain` is the decrease of the ensemble's loss in that round."""
    rows, elapsed, before = [], 0.0, None
    for each in found:
        elapsed += each["minutes"]
        now = each["ensemble"]["loss"]
        row = {  # the first seven columns are those of slm_ensembles
            "round": each["round"],
            "teacher_eval_loss": teacher["loss"],
            "ensemble_eval_loss": now,
            "student_eval_loss": each["student"]["loss"],
            "ensemble_size": each["members"],
            "round_duration_minutes": each["minutes"],
            "total_elapsed_minutes": round(elapsed, 2),
        }
        for key in ("perplexity", "kl", "agreement"):
            row |= {f"{who}_{key}": each[who][key] for who in ("ensemble", "student")}
        row["ensemble_parameters"] = each["ensemble"]["parameters"]
        row["gain"] = "" if None in (before, now) else before - now
        before = now
        rows.append(row)
    return rows


def _panels(teacher, rows) -> list[plots.Panel]:
    """Makes panels of loss, KL and perplexity against the ensemble's size and its parameters."""
    panels = []
    for column, over in (("size", "members"), ("parameters", "parameters of all members")):
        x = np.array([row[f"ensemble_{column}"] for row in rows], float)
        for key, of_teacher, title in (
            ("eval_loss", "loss", "loss (nats / token)"),
            ("kl", "", "KL(teacher ‖ model) (nats / token)"),
            ("perplexity", "perplexity", "perplexity"),
        ):
            looks = [
                ("ensemble", plots.STUDENT, "-", [row[f"ensemble_{key}"] for row in rows]),
                ("last member alone", plots.BASELINE, "-", [row[f"student_{key}"] for row in rows]),
            ]
            if of_teacher:
                looks.append(("teacher", plots.TEACHER, ":", [teacher[of_teacher]] * len(rows)))
            lines = [  # a missing value is None, and NaN as a number
                plots.Line(label, colour, dash, [(x, np.array(values, float))])
                for label, colour, dash, values in looks
            ]
            panels.append(plots.Panel(title, "", lines, linear=True, over=over))
    return panels
