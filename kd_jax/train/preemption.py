"""Handles SIGTERM: all processes of a run agree on a step, save there and exit.

One process may get the signal before the others, or alone. So they exchange a flag at every step,
by a small program that runs after the train step and is read a step later, when it has long
finished. (JAX's preemption service loses a signal that comes between two stages.)
"""

import signal

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

_sum = jax.jit(lambda caught_N: caught_N.sum())


class Preemption:
    """A context manager that catches SIGTERM."""

    def __init__(self, mesh: Mesh):
        self._caught, self._asked = False, None
        self._alone = jax.process_count() == 1
        self._place = NamedSharding(mesh, P(mesh.axis_names))
        self._local = sum(d.process_index == jax.process_index() for d in mesh.devices.flat)

    def __enter__(self):
        self._previous = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_):
        signal.signal(signal.SIGTERM, self._previous)

    def _note(self, *_):
        self._caught = True

    def requested(self) -> bool:
        """Tells whether to save now and exit; all processes call it, and get the same result."""
        if self._alone:
            return self._caught
        found = self._asked is not None and bool(self._asked)
        caught_N = np.full(self._local, self._caught, np.int32)
        self._asked = _sum(jax.make_array_from_process_local_data(self._place, caught_N))
        return found

    def requested_now(self) -> bool:
        """Tells whether to save now and exit, without the delay of a step: processes wait for each
        other."""
        self.requested()
        return self.requested()


class Preempted(SystemExit):
    """The exit after the last save, with the status of a process that SIGTERM ended."""

    def __init__(self):
        super().__init__(128 + signal.SIGTERM)
