"""What a run keeps of its figures, and the time that it takes."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from kd_jax import storage
from kd_jax.report import runs, table
from kd_jax.run import origins

if TYPE_CHECKING:
    from kd_jax.run.run import Run

log = logging.getLogger(__name__)


def kept(path: epath.Path, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The figures in `path`; where it is not there, those that `measure` gives, which the first
    process writes. What is not finite is None, and said."""
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
    """The results of a run that is over, shown again; None for any other."""
    path = folder / "results.json"
    if not path.exists():
        return None
    results = storage.read_json(path)
    if changed := origins.changed_since(folder):
        log.warning("changed since this run, whose figures stay: %s", ", ".join(changed))
    show(folder, results)
    return results


def roles(run: Run) -> dict[str, str]:
    """Names the stages that reports compare (kd_jax/report/runs.py): the student, which the run is
    about, its baseline, which trains the same model on the labels, and their teacher."""
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
        print(f"exported: {results['export']['path']}\ncurves: {folder / 'plots'}", flush=True)


def speed(folder: epath.Path) -> dict[str, float | None]:
    """Median tokens and rows a second, and the share of time spent waiting for batches."""
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
    """Waits until all processes are there."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


class Stopwatch:
    """Seconds by part; compilation, which happens inside of parts, is taken out of them."""

    def __init__(self):
        self._began = time.perf_counter()
        self._seconds: dict[str, float] = {}
        self._compiling = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._note)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Counts what happens meanwhile as `name`; parts do not nest."""
        began, compiled = time.perf_counter(), self._compiling
        yield
        spent = time.perf_counter() - began - (self._compiling - compiled)
        self._seconds[name] = self._seconds.get(name, 0.0) + spent

    def report(self) -> dict:
        """For results.json: seconds since the watch was made, and of each part of them, of which
        "compiling" is one."""
        parts = self._seconds | {"compiling": self._compiling}
        return {
            "seconds": round(time.perf_counter() - self._began, 1),
            "seconds_by_part": {name: round(value, 2) for name, value in parts.items()},
        }

    def _note(self, event: str, seconds: float, **details: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self._compiling += seconds


class Compiling:
    """Seconds that programs took to compile while it is open (a context manager)."""

    seconds = 0.0

    def __enter__(self):
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(self, *_):
        jax.monitoring.unregister_event_duration_listener(self._listen)

    def _listen(self, event: str, seconds: float, **_) -> None:
        if event.startswith("/jax/core/compile/"):  # tracing, lowering, XLA
            self.seconds += seconds
