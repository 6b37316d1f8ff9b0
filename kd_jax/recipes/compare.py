"""Compares finished runs in a report: tables over runs and stages, spread over seeds, and curves.

Runs whose config.json differs only in the seed form a group: one row for each stage, with mean and
standard deviation. Reads config.json, results.json and the csv files; loads no model.
"""

import datetime
import json
import shlex
from collections.abc import Callable, Sequence

from etils import epath

from kd_jax.errors import UserError
from kd_jax.report import page, plots, report, runs, table
from kd_jax.report.runs import Run
from kd_jax.report.table import Table


def compare(workdirs: Sequence[str], out: str) -> tuple[list[Table], list[str]]:
    """Writes report.html, report.md and the pictures of report.md into `out`.

    Returns:
      The tables, and the paths of the files written.

    Raises UserError if a folder is not a finished run, if two runs are the same, or if runs were
    evaluated on different splits or tasks.
    """
    if not workdirs:
        raise UserError("no run to compare: give one or more run directories")
    groups = group([runs.read(workdir) for workdir in workdirs])
    found = [run for members in groups.values() for run in members]
    split = _agree("splits", found, lambda run: str(run.results.get("split"))) + " split"
    _agree("tasks", found, lambda run: run.task)
    _agree("primary figures", found, lambda run: run.results.get("primary", "loss"))

    results = {label: [run.results for run in members] for label, members in groups.items()}
    tables = [table.of_runs(each, f"{label}, {split}") for label, each in results.items()]
    if len(groups) > 1:
        tables.append(table.of_groups(results))

    curves = {
        label: [(run.results, runs.curves(run.workdir)) for run in members]
        for label, members in groups.items()
    }
    folder, command = epath.Path(out), ["python", "-m", "kd_jax.compare", *workdirs, "--out", out]
    made = f"Made on {datetime.date.today().isoformat()} by {shlex.join(command)}"
    pictures = plots.curves(curves) | plots.trade_off(curves)
    text = report.build(groups, pictures, made)
    subject = next(iter(groups)) if len(groups) == 1 else f"{len(groups)} configurations"
    files = plots.draw(pictures, subject, folder)
    student = runs.roles(found[0].results).student
    (folder / "report.html").write_text(page.write(text, pictures, student))
    (folder / "report.md").write_text(text)
    return tables, [str(folder / "report.html"), str(folder / "report.md"), *files]


def _agree(what: str, found: Sequence[Run], key: Callable[[Run], str]) -> str:
    """Returns the value of `key` that all runs share; UserError if they differ."""
    by_value = {key(run): run.workdir for run in found}
    if len(by_value) > 1:
        where = ", ".join(f"{folder}: {value}" for value, folder in by_value.items())
        raise UserError(f"these runs report different {what} ({where}): compare them separately")
    return next(iter(by_value))


def group(found: Sequence[Run]) -> dict[str, list[Run]]:
    """Groups runs that differ only in the seed, in the given order, under distinct labels."""
    groups: dict[str, list[Run]] = {}
    for run in found:
        config = {key: value for key, value in run.config.items() if key != "seed"}
        groups.setdefault(json.dumps(config, sort_keys=True), []).append(run)
    for members in groups.values():
        by_seed: dict[int, Run] = {}
        for run in sorted(members, key=lambda run: run.seed):
            if run.seed in by_seed:
                raise UserError(
                    f"{by_seed[run.seed].workdir} and {run.workdir} are the same run (same "
                    f"configuration, seed {run.seed}): leave one out"
                )
            by_seed[run.seed] = run
        members[:] = by_seed.values()
    return _labelled(list(groups.values()))


def _labelled(groups: list[list[Run]]) -> dict[str, list[Run]]:
    """Labels groups by their experiment's name, and by the keys in which they differ from others of
    that name, or by the folder if these are many."""
    names = [members[0].results["config"] for members in groups]
    found = [""] * len(groups)
    for name in set(names):
        same_name = [i for i, its in enumerate(names) if its == name]
        parts = runs.differences([groups[i][0].config for i in same_name])
        for i, own in zip(same_name, parts, strict=True):
            own = own if len(own) <= runs.MOST_DIFFERENCES else [f"({groups[i][0].workdir.name})"]
            found[i] = " ".join([name, *own])
    return dict(zip(found, groups, strict=True))
