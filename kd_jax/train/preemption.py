"""SIGTERM means: save and leave. On several processes all agree on the step to save at."""

import signal

import jax
from jax.experimental import multihost_utils


class Preemption:
    """Catches SIGTERM while it is open (a context manager)."""

    def __init__(self):
        self._caught = False

    def __enter__(self):
        # With several processes jax.distributed catches the signal and agrees on a step.
        self._alone = jax.process_count() == 1
        if self._alone:
            self._previous = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_):
        if self._alone:
            signal.signal(signal.SIGTERM, self._previous)

    def _note(self, *_):
        self._caught = True

    def requested(self, step: int) -> bool:
        """Whether to save at `step` and leave; the same answer on every process."""
        return (
            self._caught or not self._alone and multihost_utils.reached_preemption_sync_point(step)
        )


class Preempted(SystemExit):
    """Raised after the last save. Its exit status is that of a process ended by SIGTERM."""

    def __init__(self):
        super().__init__(128 + signal.SIGTERM)
