"""Compares finished runs: a report with tables over runs and stages, spread over seeds, and curves.

Runs whose config.json differs in nothing but the seed form a group: one row a stage, with mean and
standard deviation. Reads config.json, results.json and the csv files; loads no model.
"""

import json
from collections.abc import Callable, Sequence

from etils import epath

from kd_jax.errors import UserError
from kd_jax.evals import document, html, plots, report, runs, table, tradeoff
from kd_jax.evals.runs import Run
from kd_jax.evals.table import Table

MAX_KEYS = 3  # differing keys in a label; where more differ, the label names the folder instead


def compare(workdirs: Sequence[str], out: str) -> tuple[list[Table], list[str]]:
    """Writes report.html, report.md and the pictures that the latter shows into `out`.

    Returns:
      The tables, and the paths of the files written.

    Raises UserError where a folder is no run or not finished, where two runs are the same, and
    where runs were evaluated on different splits or tasks.
    """
    if not workdirs:
        raise UserError("no run to compare: give one or more run directories")
    groups = group([runs.read(workdir) for workdir in workdirs])
    found = [run for members in groups.values() for run in members]
    split = _agree("splits", found, lambda run: str(run.results.get("split"))) + " split"
    _agree("tasks", found, report.task_of)
    primary = _agree("primary figures", found, lambda run: run.results.get("primary", "loss"))

    figures = {label: [run.stages for run in members] for label, members in groups.items()}
    tables = [
        table.of_runs(members, f"{label}, {split}", primary) for label, members in figures.items()
    ]
    if len(groups) > 1:
        title = f"{len(groups)} configurations, {split}: mean ± standard deviation over seeds"
        tables.append(table.of_groups(figures, title, primary))

    curves = {
        label: [runs.curves(run.workdir) for run in members] for label, members in groups.items()
    }
    page = report.build(groups, curves)
    folder = epath.Path(out)
    pictures = plots.draw(curves, folder)
    if scatters := report.scatters(figures, primary):
        tradeoff.save(scatters, folder / report.TRADE_OFF)
        pictures.append(str(folder / report.TRADE_OFF))
    (folder / "report.html").write_text(html.page(page))
    (folder / "report.md").write_text(document.markdown(page))
    return tables, [str(folder / "report.html"), str(folder / "report.md"), *pictures]


def _agree(what: str, found: Sequence[Run], key: Callable[[Run], str]) -> str:
    """The one value that all runs have."""
    by_value = {key(run): run.workdir for run in found}
    if len(by_value) > 1:
        where = ", ".join(f"{folder}: {value}" for value, folder in by_value.items())
        raise UserError(f"these runs report different {what} ({where}): compare them separately")
    return next(iter(by_value))


def group(found: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs that differ only in the seed, in the order given, under labels that tell them apart."""
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
    """The name of the configuration, and the keys in which it differs from others of that name."""
    flat = [dict(report.leaves(members[0].config)) for members in groups]
    names = [members[0].results["config"] for members in groups]
    labelled = {}
    for members, config, name in zip(groups, flat, names, strict=True):
        same_name = [other for other, its in zip(flat, names, strict=True) if its == name]
        keys = sorted({key for other in same_name for key in other} - {"seed"})
        differing = [key for key in keys if len({str(other.get(key)) for other in same_name}) > 1]
        if len(differing) > MAX_KEYS:
            label = f"{name} ({members[0].workdir.name})"
        else:
            label = " ".join([name, *(f"{key}={config.get(key)}" for key in differing)])
        labelled[label] = members
    return labelled
