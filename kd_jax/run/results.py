"""Stores and shows the metrics of a run, and measures its time."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from clu import parameter_overview
from etils import epath
from jax.experimental import multihost_utils

from kd_jax import storage
from kd_jax.models.blueprint import count
from kd_jax.report import runs, table
from kd_jax.run import origins
from kd_jax.types import Params

if TYPE_CHECKING:
    from kd_jax.run.run import Run

log = logging.getLogger(__name__)


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
    labels_only = [each.name for each in same if not each.learns and not each.made]
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
