"""How a sequential ensemble does after each of its rounds, over the seeds of a configuration."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from kd_jax.evals import quantities, table
from kd_jax.evals.quantities import Figure, count
from kd_jax.evals.table import Table

_LOSS, _KL, _AGREEMENT = (
    Figure(key, title, "{:.4f}".format, better)
    for key, title, better in (
        ("loss", "loss", -1),
        ("kl", "KL to teacher", -1),
        ("agreement", "top-1 agreement", 1),
    )
)
_SHOWN = {"all members": (_LOSS, _KL, _AGREEMENT), "last member alone": (_LOSS, _KL)}
_WHO = {"all members": "ensemble", "last member alone": "student"}

Results = Mapping[str, Any]  # of a run: "rounds", "trend"


def of_runs(label: str, runs: Sequence[Results]) -> Table | None:
    """A row a round: means over the seeds ± standard deviation. None where the runs have none."""
    if not runs or not all(run.get("rounds") for run in runs):
        return None
    rows = []
    for each in zip(*(run["rounds"] for run in runs), strict=True):
        sizes = each[0]["members"], each[0]["ensemble"]["parameters"]
        row = [str(each[0]["round"]), str(sizes[0]), count(sizes[1])]
        for whose, figures in _SHOWN.items():
            found = [result[_WHO[whose]] for result in each]
            row += [table.mean(figure, found) for figure in figures]
        rows.append(row)
    titles = [figure.title for figures in _SHOWN.values() for figure in figures]
    header = ["round", "members", "parameters", *titles]
    spans = (("", 2), *((whose, len(figures)) for whose, figures in _SHOWN.items()))
    seeds = f", {len(runs)} seeds: mean ± standard deviation" if len(runs) > 1 else ""
    return Table(f"{label}: rounds{seeds}", header, rows, spans=spans)


def beside(groups: Mapping[str, Sequence[Results]]) -> Table:
    """The ends of several configurations, a row each: means over the seeds ± standard deviation,
    and KL less that of the first one, paired by seed, ± standard error."""
    first = {run["seed"]: run for run in next(iter(groups.values()))}
    rows = []
    for label, runs in groups.items():
        whole = [run["stages"]["ensemble"] for run in runs]
        both = [run for run in runs if run["seed"] in first] if rows else []
        others = [first[run["seed"]]["stages"]["ensemble"] for run in both]
        change = quantities.compare(_KL, [run["stages"]["ensemble"] for run in both], others)
        rows.append(
            [
                *(label, str(runs[0]["rounds"][-1]["members"]), f"{whole[0]['parameters']:,}"),
                *(f"{whole[0]['steps']:,}", f"{whole[0]['training_flops'] / 1e12:.2f}"),
                *(table.mean(figure, whole) for figure in (_LOSS, _KL, _AGREEMENT)),
                change.show() if change else "",
            ]
        )
    header = ["", "members", "parameters", "steps", "operations (T)"]
    header += [figure.title for figure in (_LOSS, _KL, _AGREEMENT)]
    return Table("", [*header, "KL, less the first row's"], rows)


def findings(runs: Sequence[Results]) -> str:
    """In words: how far KL has come from the first to the last round, paired by seed, and what
    the fit over sizes says; "" for a single round."""
    last = len(runs[0]["rounds"])
    if last < 2:
        return ""
    before, after = ([run["rounds"][i]["ensemble"] for run in runs] for i in (0, last - 1))
    change = quantities.compare(_KL, after, before)
    text = f"KL to the teacher, round {last} less round 1: {change.show()} nats a token."
    if all(run.get("trend") for run in runs):
        for name, title in (("kl", "KL"), ("loss", "Loss")):
            limit, slope = (
                statistics.fmean(run["trend"][name][key] for run in runs)
                for key in ("limit", "slope")
            )
            errors = [
                max(run["trend"][name][f"{key}_error"] for run in runs)
                for key in ("limit", "slope")
            ]
            text += (
                f" {title} of n members, fitted: {limit:.4f} ± {errors[0]:.4f} "
                f"+ ({slope:.4f} ± {errors[1]:.4f}) / n."
            )
    return text
