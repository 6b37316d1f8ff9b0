"""Where the time of a run goes, part by part."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import jax


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
