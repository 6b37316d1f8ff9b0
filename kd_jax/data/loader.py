"""Makes the stream of batches, a function of (seed, step), the same on any number of processes.

Positions of the global stream count rows from 0. Position i belongs to epoch i // n of n rows, and
each epoch has its own order, drawn from (seed, epoch). Batch s holds the positions
[s * B, (s + 1) * B), and process p of k its p-th share. So a run resumes at any step without
replaying, also on another number of processes.
"""

import copy
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Self

import grain
import numpy as np

from kd_jax.errors import UserError
from kd_jax.types import Batch


def read_options(cores: int) -> grain.ReadOptions:
    """Chooses how many threads make batches: one for every four cores (the GIL leaves more of them
    idle), at least 2 and at most 16. Each prepares two batches ahead, which takes memory."""
    threads = min(max(2, cores // 4), 16)
    return grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)


READ = read_options(os.cpu_count() or 1)


class Batches:
    """A stream of batches of NumPy arrays, each a function of its step."""

    _batches: grain.MapDataset

    def __getitem__(self, step: int) -> Batch:
        """Makes the batch of one step."""
        return self._batches[step]

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """Iterates over batches from step `start` on, made ahead of time by threads."""
        return iter(self._batches[start:].to_iter_dataset(READ))

    def map(self, change: Callable[[Batch], Batch]) -> Self:
        """Returns the same stream with `change` applied to each batch (of this process's rows)."""
        changed = copy.copy(self)
        changed._batches = self._batches.map(change)
        return changed


def rows_of_process(size: int, batch_size: int, process_count: int) -> int:
    """Counts the rows of a batch that one process holds. Raises UserError where the number of
    processes does not divide the batch, and ValueError for a stream of no rows."""
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
        """Makes an endless, shuffled stream with a `seed`, or one pass without: there the last
        batch is filled up with rows of id -1, mask 0 and weight 0, so that all batches have one
        shape and all processes have equally many.

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
        """Returns a stream of these rows only: shuffled by `seed`, or one pass without a seed."""
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
        """Returns the same stream without its first `steps` batches."""
        shifted = copy.copy(self)
        shifted._batches = self._batches[steps:]
        return shifted


def blank_rows(batch: Batch, real_B: np.ndarray) -> Batch:
    """Marks rows as filling, by id -1, mask 0 and weight 0, where the bool `real_B` is False."""
    real_B1 = real_B[:, None].astype(np.float32)
    return batch.replace(
        ids_B=np.where(real_B, batch.ids_B, -1).astype(np.int32),
        mask_BT=batch.mask_BT * real_B1,
        weights=batch.weights * real_B1,
    )


# Buckets: batches of rows of similar length. A few fixed lengths, so that few programs are compiled
# and little padding is computed: multiples of so many tokens, which matrix units like; at most so
# many; each of which saves that share of the tokens.
_TRAINING = (8, 6, 0.03)
_PASS = (4, 12, 0.01)  # is made again and again, and its programs are compiled sooner
_BATCHES = 3  # of a pass, that make a length worth compiling


def lengths_of(lengths_N: np.ndarray, seq_len: int, most: int | None = None) -> tuple[int, ...]:
    """Chooses bucket lengths of training, ascending, that leave the fewest padded tokens when every
    row goes to the shortest bucket that holds it. Lengths are multiples of 8, or `seq_len`; the
    last one holds the longest row. There are at most `most`, never over six, and fewer if one more
    saves less than 3%.
    """
    multiple, limit, worth = _TRAINING
    return _lengths(lengths_N, seq_len, multiple, min(most or limit, limit), worth)


def lengths_of_pass(lengths_N: np.ndarray, seq_len: int, batch_size: int) -> tuple[int, ...]:
    """Chooses bucket lengths of one pass, ascending, that leave the fewest padded tokens in the
    batches that `BucketStream` makes of it. Lengths are multiples of 4, or `seq_len`. There are at
    most twelve, one for every three batches, and fewer if one more saves less than 1%.
    """
    multiple, most, worth = _PASS
    longest_S = np.sort(lengths_N)[::-batch_size]
    most = min(most, max(1, len(longest_S) // _BATCHES))
    return _lengths(longest_S, seq_len, multiple, most, worth)


def _lengths(
    lengths_N: np.ndarray, seq_len: int, multiple: int, most: int, worth: float
) -> tuple[int, ...]:
    ends = [*range(multiple, seq_len, multiple), seq_len]
    rows = np.searchsorted(np.sort(lengths_N), ends, side="right").tolist()  # that fit into each
    last = rows.index(len(lengths_N))
    ends, rows = ends[: last + 1], rows[: last + 1]
    # best[e]: (computed tokens of the rows that fit into ends[e], the buckets) with e the last one.
    best = [(n * end, (end,)) for n, end in zip(rows, ends, strict=True)]
    for _ in range(most - 1):
        fewer = best[last]
        best = [
            min(
                [best[e]]
                + [
                    (best[f][0] + (rows[e] - rows[f]) * ends[e], (*best[f][1], ends[e]))
                    for f in range(e)
                    if 0 < rows[f] < rows[e]
                ]
            )
            for e in range(len(ends))
        ]
        if best[last][0] > (1 - worth) * fewer[0]:
            return fewer[1]
    return best[last][1]


class BucketStream(Batches):
    """Batches whose rows share a bucket.

    With a seed, endless: an epoch has n // B batches, at least one. Its rows are shuffled (n % B
    of them, different ones in every epoch, are skipped), each bucket is cut into batches of B,
    left-over rows move to the next longer bucket, and the batches are shuffled. The rows of a step
    are a function of (seed, step) alone. Without a seed: one pass over all rows in the order of
    their length, as few batches as there can be, each in the shortest bucket that holds its rows.

    A batch with too few rows (n < B; the first and shortest one of a pass) is filled up with rows
    of id -1, mask 0 and weight 0.
    """

    def __init__(
        self,
        lengths_N: np.ndarray,
        buckets: Sequence[int],
        make: Callable[[np.ndarray, int], Batch],
        batch_size: int,
        *,
        seed: int | None = None,
        process_index: int = 0,
        process_count: int = 1,
    ) -> None:
        """Assigns rows to buckets; `make(ids_B, length) -> Batch` makes rows with NumPy
        (`Encoded.batch`), or as many rows for each id. `batch_size` counts ids and is global:
        process p of k holds the p-th share.

        Raises UserError when the processes do not divide the batch.
        """
        rows = rows_of_process(len(lengths_N), batch_size, process_count)
        self.size = len(lengths_N)
        self.batch_size = batch_size
        self.buckets = tuple(buckets)
        bucket_N = np.searchsorted(self.buckets, lengths_N)
        if seed is None:
            plan = functools.cache(lambda epoch: _one_pass(lengths_N, bucket_N, batch_size))
            self.steps_per_epoch = len(plan(0)[0])
            self.steps = self.steps_per_epoch
            numbers = grain.MapDataset.range(self.steps)
        else:
            # Batches near an epoch's end are made while those of the next one are asked for.
            plan = functools.lru_cache(maxsize=2)(
                lambda epoch: _epoch(bucket_N, batch_size, seed, epoch)
            )
            self.steps_per_epoch = max(1, self.size // batch_size)
            self.steps = None
            numbers = grain.MapDataset.range(self.steps_per_epoch).repeat()
        part = slice(process_index * rows, (process_index + 1) * rows)

        def batch(step: int, number: int) -> Batch:
            ids_SB, bucket_S = plan(step // self.steps_per_epoch)
            ids_B, fitting = ids_SB[number][part], ids_SB[number].max()
            made = make(np.where(ids_B < 0, fitting, ids_B), self.buckets[bucket_S[number]])
            return blank_rows(made, np.repeat(ids_B >= 0, len(made.ids_B) // len(ids_B)))

        self._batches = numbers.map_with_index(batch)


def _epoch(bucket_N, batch_size, seed, epoch):
    """Orders the rows of one epoch: returns (row ids (S, B), bucket of each batch (S,))."""
    random = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, epoch))))
    order_N = random.permutation(len(bucket_N))
    if len(order_N) < batch_size:
        ids_1B = np.pad(order_N, (0, batch_size - len(order_N)), constant_values=-1)[None]
        return ids_1B, bucket_N.max(keepdims=True)
    # Rows that will not fit are taken away first, so that it does not hit the longest ones.
    order_N = order_N[: len(order_N) // batch_size * batch_size]
    ids_SB = order_N[np.argsort(bucket_N[order_N], kind="stable")].reshape(-1, batch_size)
    ids_SB = random.permutation(ids_SB)
    return ids_SB, bucket_N[ids_SB].max(axis=1)


def _one_pass(lengths_N, bucket_N, batch_size):
    """Orders the rows of one pass, as `_epoch` does: cut from the longest row downwards, since no
    other way leaves fewer padded tokens in batches of one size."""
    order_N = np.argsort(lengths_N, kind="stable")
    filling = -len(order_N) % batch_size
    ids_SB = np.pad(order_N, (filling, 0), constant_values=-1).reshape(-1, batch_size)
    return ids_SB, bucket_N[ids_SB[:, -1]]
