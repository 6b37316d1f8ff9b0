"""Keeps and shows the figures of a run and the time that it takes; says in sentences what it reads
and trains, and where its figures are worth nothing."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from clu import parameter_overview
from etils import epath
from jax.experimental import multihost_utils

from kd_jax import storage
from kd_jax.models.blueprint import count
from kd_jax.report import runs, table
from kd_jax.run import origins
from kd_jax.run.run import Run
from kd_jax.run.stage import Stage
from kd_jax.tasks.task import Task
from kd_jax.train.loop import Fit
from kd_jax.types import Params

log = logging.getLogger(__name__)

UNIFORM = 0.99  # of the loss of a uniform guess: a model beyond this knows nothing
CLASSES = 8  # that are counted in a sentence


def kept(path: epath.Path, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Reads the metrics in the file `path`, or, if it is missing, measures them and writes it (in
    the first process). A value that is not finite becomes None, with a warning."""
    if path.exists():
        return storage.read_json(path)
    measured = measure()
    found = storage.finite(measured)
    if lost := [key for key, value in measured.items() if value is not None and found[key] is None]:
        log.warning("%s: not finite, null there: %s", path, ", ".join(lost))
    if jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        storage.write_json(path, found)
    return found


def finished(folder: epath.Path) -> dict[str, Any] | None:
    """Reads the results of a finished run and shows them again; None for an unfinished run."""
    path = folder / "results.json"
    if not path.exists():
        return None
    results = storage.read_json(path)
    if changed := origins.changed_since(folder):
        log.warning("changed since this run, whose figures stay: %s", ", ".join(changed))
    show(folder, results)
    return results


def roles(run: Run) -> dict[str, str]:
    """Names the stages that reports compare (kd_jax/report/runs.py): the student (the run's main
    stage), its baseline, which trains the same model on the labels, and their teacher."""
    last, same = run.principal, [each for each in run.stages if each.model == run.principal.model]
    labels_only = [each.name for each in same if not (each.learns or each.made or each.batches_of)]
    baseline = next((name for name in labels_only if name not in run.teachers), "")
    student = last.name if last.name not in (baseline, *run.teachers) else ""
    return {"teacher": run.teachers[0], "baseline": baseline, "student": student}


def show(folder: epath.Path, results: dict) -> None:
    """Prints a finished run's table, in the first process."""
    if jax.process_index() == 0:
        title = f"{results['config']}, {results['split']} split"
        table.of_runs([results], title).print()
        for remark in results.get("remarks", []):
            print(f"note: {remark}")
        print(f"exported: {results['export']['path']}\ncurves: {folder / 'plots'}", flush=True)


def write_overview(stage: str, params: Params, path: epath.Path) -> None:
    """Writes a table of all parameters to `path`, and logs their number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(parameter_overview.get_parameter_overview(params, include_stats=False) + "\n")
    log.info("%s: %s parameters: %s", stage, f"{count(params):,}", path)


def write_epochs(folder: epath.Path, stage: str) -> None:
    """Writes epochs.json of a stage in the run directory `folder`: its curves, a row for each
    evaluation; only in the first process."""
    if jax.process_index() == 0:
        curves = runs.curves(folder)[stage]
        rows = runs.by_evaluation(curves.training, curves.validation)
        storage.write_json(folder / stage / "epochs.json", rows)


def speed(folder: epath.Path) -> dict[str, float | None]:
    """Computes the median of tokens and rows a second, and the share of time spent waiting for
    batches."""
    found = runs.read_columns(folder / "timing.csv")
    if not found:
        return {"tokens_per_second": None}
    waited = (found["seconds"] * found["input_wait_fraction"]).sum()
    return {
        "tokens_per_second": float(np.median(found["tokens_per_second"])),
        "rows_per_second": float(np.median(found["rows_per_second"])),
        "input_wait_fraction": round(float(waited / found["seconds"].sum()), 5),
    }


def together(what: str) -> None:
    """Waits until all processes have reached this point."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


class Compiling:
    """A context manager that adds up the seconds of compilation inside it."""

    seconds = 0.0

    def __enter__(self):
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(self, *_):
        jax.monitoring.unregister_event_duration_listener(self._listen)

    def _listen(self, event: str, seconds: float, **_) -> None:
        if event.startswith("/jax/core/compile/"):  # tracing, lowering, XLA
            self.seconds += seconds


class Stopwatch:
    """A stopwatch that adds up seconds by section; compilation counts as a separate section."""

    def __init__(self):
        self._began = time.perf_counter()
        self._seconds: dict[str, float] = {}
        self._compiling = Compiling()

    @contextlib.contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Counts the time of the block under `name`; sections do not nest."""
        began, compiled = time.perf_counter(), self._compiling.seconds
        with self._compiling:
            yield
        spent = time.perf_counter() - began - (self._compiling.seconds - compiled)
        self._seconds[name] = self._seconds.get(name, 0.0) + spent

    def report(self) -> dict:
        """Returns, for results.json, the seconds since the stopwatch was made, in total and by
        section, including "compiling"."""
        sections = self._seconds | {"compiling": self._compiling.seconds}
        return {
            "seconds": round(time.perf_counter() - self._began, 1),
            "seconds_by_part": {name: round(value, 2) for name, value in sections.items()},
        }


def describe_data(data: Mapping[str, Mapping[str, Any]], seq_len: int) -> list[str]:
    """Describes each split: its size, classes, longest text, and how much does not fit into a row.
    `data`: see `Task.prepare`."""
    found = []
    for split, about in data.items():
        sizes = [
            f"{about[key]:,} {key}"
            for key in ("examples", "documents", "conversations", "texts", "tokens", "rows")
            if key in about
        ]
        text = f"{split}: {about['name']}, {', '.join(sizes)}"
        if classes := about.get("classes"):
            shown = [f"{name} {count:,}" for name, count in [*classes.items()][:CLASSES]]
            shown += [f"{len(classes) - CLASSES} more"] if len(classes) > CLASSES else []
            text += f"; classes: {', '.join(shown)}"
        if about.get("longest"):
            text += f"; the longest has {about['longest']:,} tokens"
        if cut := about.get("cut"):
            kinds = ("texts", "examples", "conversations", "rows")
            count = next(about[kind] for kind in kinds if about.get(kind))
            text += f"; {cut:,} ({cut / count:.1%}) do not fit into {seq_len} tokens"
        found.append(text)
    return found


def describe_stage(stage: Stage) -> str:
    """Describes a stage before it runs, and warns if all of it is warm-up."""
    terms = ", ".join(stage.program.objective.names)
    teachers = f" from {', '.join(stage.teachers)}" if stage.learns else ""
    epochs = f" ({stage.epochs:.3g} epochs)" if stage.epochs else ""
    text = (
        f"{stage.name}: {stage.steps:,} steps of {stage.batch_size} rows{epochs}, {terms}{teachers}"
    )
    rate, last = stage.schedules.learning_rate, stage.steps - 1
    if last > 0 and rate(last) > rate(last - 1):
        text += (
            "; it ends while the learning rate still warms up: train longer, or lower "
            "optim.schedule.warmup"
        )
    return text


def describe_end(stage: Stage, fitted: Fit) -> list[str]:
    """Explains why a stage ended before its last step, and how much of its schedule was left."""
    ended, rate = fitted.steps, stage.schedules.learning_rate
    if ended >= stage.steps:
        return []
    peak = max(rate(step) for step in range(ended))
    left = rate(ended) / peak if peak else 0.0
    text = (
        f"{stage.name} stopped after {ended:,} of {stage.steps:,} steps: nothing was better than "
        f"step {fitted.best_step:,} (config.patience); the learning rate was at {left:.0%} of its "
        f"peak"
    )
    unused = ": a schedule of fewer steps, or more patience, would use it up"
    return [text + (unused if left > 0.2 else "")]


def remarks(
    stages: Mapping[str, Mapping[str, Any]], task: Task, roles: Mapping[str, str]
) -> list[str]:
    """Warns about reported metrics that mean nothing, such as a teacher no better than chance.

    Args:
        stages: metrics by stage.
        task: the task, for its primary metric and its number of classes or tokens.
        roles: the names of the stages "teacher", "baseline" and "student", "" for none.
    """
    classes = 0
    if task.head in ("mlm", "clm"):
        classes = len(task.tokenizer) if task.tokenizer else 0
    elif task.head == "classification" and not task.regression:
        classes = len(task.labels)
    found = [line for name, own in stages.items() for line in _guesses(name, own, classes)]
    key = task.primary
    teacher, baseline, student = (roles.get(name) for name in ("teacher", "baseline", "student"))

    def no_better(one: str | None, other: str | None) -> str:
        ours, theirs = (stages.get(name or "", {}).get(key) for name in (one, other))
        if ours is None or theirs is None or (ours > theirs if task.larger else ours < theirs):
            return ""
        return f"{one} is no better than {other} ({key} {ours:.4f} and {theirs:.4f})"

    if text := no_better(teacher, baseline):
        found.append(f"{text}, which had no teacher: there is nothing to distil")
    if text := no_better(student, baseline):
        found.append(f"distillation did not help: {text}")
    return found


def _guesses(name: str, figures: Mapping[str, Any], classes: int) -> list[str]:
    """Warns about a model that is no better than guessing without reading the input."""
    loss, counts = figures.get("loss"), [sum(row) for row in figures.get("confusion", [])]
    accuracy, most = figures.get("accuracy"), max(counts, default=0) / (sum(counts) or 1)
    if counts and accuracy is not None and accuracy > most:
        return []  # whatever its loss, which a classifier that is too sure of itself makes large
    if classes > 1 and loss is not None and loss >= UNIFORM * math.log(classes):
        return [
            f"{name} has learnt nothing: its loss of {loss:.4f} is that of a uniform guess among "
            f"{classes:,}, {math.log(classes):.4f}"
        ]
    if counts and accuracy is not None:
        return [
            f"{name} is no better than naming the most frequent class always (accuracy "
            f"{accuracy:.4f} and {most:.4f})"
        ]
    return []
