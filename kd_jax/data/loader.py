"""The stream of batches: a function of (seed, step), the same on any number of processes.

Positions of the global stream count rows from 0. Position i belongs to epoch i // n of n rows, and
each epoch has its own order, drawn from (seed, epoch). Batch s holds the positions
[s * B, (s + 1) * B), and process p of k its p-th part. So a run resumes at any step without
replaying, also on another number of processes.
"""

import copy
import os
from collections.abc import Callable, Iterator
from typing import Self

import grain
import numpy as np

from kd_jax.errors import UserError
from kd_jax.types import Batch


def read_options(cores: int) -> grain.ReadOptions:
    """Threads that make batches: two, so that one works while the other waits, and one for every
    four cores, as far as the GIL lets them. Two batches a thread wait, which takes memory."""
    threads = min(max(2, cores // 4), 16)
    return grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)


READ = read_options(os.cpu_count() or 1)


class Batches:
    """Batches of NumPy arrays, each a function of its step: what all streams give."""

    _batches: grain.MapDataset

    def __getitem__(self, step: int) -> Batch:
        """The batch of one step."""
        return self._batches[step]

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """Batches from step `start` on, made ahead of time by threads."""
        return iter(self._batches[start:].to_iter_dataset(READ))

    def map(self, change: Callable[[Batch], Batch]) -> Self:
        """The same stream with `change` applied to each batch (of this process's rows)."""
        changed = copy.copy(self)
        changed._batches = self._batches.map(change)
        return changed


def rows_of_process(size: int, batch_size: int, process_count: int) -> int:
    """Rows of a batch that one of the processes holds. Raises UserError where they do not divide
    the batch, and ValueError for a stream of no rows."""
    if size < 1:
        raise ValueError("a stream needs at least one row")
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"batch_size={batch_size} cannot be divided among {process_count} processes"
        )
    return batch_size // process_count


class Stream(Batches):
    """Batches of a dataset of `size` rows: endless and shuffled, or one pass in order.

    `make(ids_B, epochs_B) -> Batch` makes the rows of one batch with NumPy; each row may depend
    on its id and epoch only. `batch_size` is the global one; batches hold this process's rows.
    """

    def __init__(
        self,
        size: int,
        make: Callable[[np.ndarray, np.ndarray], Batch],
        batch_size: int,
        *,
        seed: int | None = None,
        process_index: int = 0,
        process_count: int = 1,
    ) -> None:
        """With a `seed` the stream is endless and shuffled. Without, it is one pass: the last
        batch is filled up with rows of id -1, mask 0 and weight 0, so that all batches have one
        shape and all processes as many of them.

        Raises UserError when the processes do not divide the batch.
        """
        rows = rows_of_process(size, batch_size, process_count)
        self.size = size
        self.batch_size = batch_size
        self._make, self._process = make, (process_index, process_count)
        self.steps = None if seed is not None else -(-size // batch_size)
        if seed is not None:
            # grain shuffles epoch e with shuffle_seed + e: hashed, seeds 0 and 1 share no epoch.
            shuffle_seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
            order = grain.MapDataset.range(size).shuffle(seed=shuffle_seed).repeat()
        else:
            order = grain.MapDataset.range(self.steps * batch_size)

        def batch(number: int, ids: np.ndarray) -> Batch:
            if seed is None:
                return blank_rows(make(np.minimum(ids, size - 1), np.zeros_like(ids)), ids < size)
            epochs = (number * rows + np.arange(rows)) // size
            return make(ids, epochs)

        batches = order.batch(rows, drop_remainder=True).map_with_index(batch)
        self._batches = batches[process_index::process_count]

    def chosen(self, ids_N: np.ndarray, seed: int | None = None) -> "Stream":
        """A stream of these rows alone, shuffled by `seed`, or one pass."""
        index, count = self._process
        return Stream(
            len(ids_N),
            lambda ids_B, epochs_B: self._make(ids_N[ids_B], epochs_B),
            self.batch_size,
            seed=seed,
            process_index=index,
            process_count=count,
        )

    def later(self, steps: int) -> "Stream":
        """The same stream without its first `steps` batches."""
        shifted = copy.copy(self)
        shifted._batches = self._batches[steps:]
        return shifted


def blank_rows(batch: Batch, real_B: np.ndarray) -> Batch:
    """The batch with id -1, mask 0 and weight 0 where the bool array `real_B` is False."""
    real_B1 = real_B[:, None].astype(np.float32)
    return batch.replace(
        ids_B=np.where(real_B, batch.ids_B, -1).astype(np.int32),
        mask_BT=batch.mask_BT * real_B1,
        weights=batch.weights * real_B1,
    )
