"""The rounds of a sequential ensemble: a row of rounds.csv each, pictures over its size, and what a
still larger one could be expected to reach."""

import csv
import dataclasses
import io
from typing import Any

import matplotlib
import numpy as np
import scipy.optimize
from etils import epath
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from kd_jax import storage
from kd_jax.evals import plots

# The first seven are those of slm_ensembles.
COLUMNS = (
    "round",
    "teacher_eval_loss",
    "ensemble_eval_loss",
    "student_eval_loss",
    "ensemble_size",
    "round_duration_minutes",
    "total_elapsed_minutes",
    "ensemble_perplexity",
    "student_perplexity",
    "ensemble_kl",
    "student_kl",
    "ensemble_agreement",
    "student_agreement",
    "ensemble_parameters",
    "gain",
)
PICTURED = {
    "eval_loss": "loss (nats / token)",
    "kl": "KL(teacher ‖ model) (nats / token)",
    "perplexity": "perplexity",
}


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

    def at(self, n: float) -> float:
        """The value at size n."""
        return self.limit + self.slope / n


def trend(sizes: list[int], values: list[float | None]) -> Trend | None:
    """None for fewer than three sizes, which leave nothing to tell the errors by, and where a value
    is missing."""
    if len(sizes) < 3 or None in values:
        return None
    (limit, slope), covariance = scipy.optimize.curve_fit(
        lambda n, limit, slope: limit + slope / n, np.asarray(sizes, float), values
    )
    errors = np.sqrt(np.diag(covariance))
    return Trend(float(limit), float(errors[0]), float(slope), float(errors[1]))


def rows(teacher: dict[str, Any], found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a round. gain: by how much the ensemble's loss is lower than a round before."""
    made, elapsed, before = [], 0.0, None
    for each in found:
        elapsed += each["minutes"]
        row = {
            "round": each["round"],
            "teacher_eval_loss": teacher["loss"],
            "ensemble_size": each["members"],
            "round_duration_minutes": each["minutes"],
            "total_elapsed_minutes": round(elapsed, 2),
            "ensemble_parameters": each["ensemble"]["parameters"],
            "gain": ""
            if None in (before, each["ensemble"]["loss"])
            else before - each["ensemble"]["loss"],
        }
        for who in ("ensemble", "student"):
            row[f"{who}_eval_loss"] = each[who]["loss"]
            row |= {f"{who}_{key}": each[who][key] for key in ("perplexity", "kl", "agreement")}
        before = each["ensemble"]["loss"]
        made.append({column: row[column] for column in COLUMNS})
    return made


def write(folder: epath.Path, teacher: dict[str, Any], found: list[dict[str, Any]]) -> None:
    """rounds.csv, written beside its place and renamed; rounds.png."""
    made = rows(teacher, found)
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(made)
    storage.write(folder / "rounds.csv", lambda file: file.write(text.getvalue().encode()))
    draw(folder / "rounds.png", teacher, made)


def draw(path: epath.Path, teacher: dict[str, Any], made: list[dict[str, Any]]) -> None:
    """Loss, KL and perplexity over the ensemble's size, and over its parameters."""
    over = {"ensemble_size": "members", "ensemble_parameters": "parameters of all members"}
    with matplotlib.rc_context(plots.STYLE):
        figure = Figure(figsize=(11, 6), layout="constrained")
        grid = figure.subplots(len(over), len(PICTURED))
        for line, (column, label) in zip(grid, over.items(), strict=True):
            for axes, (name, title) in zip(line, PICTURED.items(), strict=True):
                x = [row[column] for row in made]
                for who, colour in (("ensemble", "#0072B2"), ("student", "#E69F00")):
                    values = np.array([row[f"{who}_{name}"] for row in made], float)  # None: NaN
                    shown = "last member alone" if who == "student" else who
                    axes.plot(x, values, "o-", color=colour, label=shown, markersize=4)
                if name != "kl":
                    level = teacher["loss"] if name == "eval_loss" else teacher["perplexity"]
                    axes.axhline(
                        np.nan if level is None else level,
                        color="#666666",
                        linestyle=":",
                        label="teacher",
                    )
                if column == "ensemble_size":
                    axes.set_title(title)
                    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
                else:
                    axes.xaxis.set_major_formatter(EngFormatter())
                axes.set_xlabel(label)
        figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower left", ncols=3)
        with path.open("wb") as file:
            figure.savefig(file, format="png", dpi=130)
