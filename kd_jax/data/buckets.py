"""Batches of rows of similar length: a few fixed lengths, so that few programs are compiled and
little padding is computed."""

import functools
from collections.abc import Callable, Sequence

import grain
import numpy as np

from kd_jax.data.loader import Batches, blank_rows, rows_of_process
from kd_jax.types import Batch

_MULTIPLE = 8  # lengths that the matrix units of accelerators like
_MOST = 6  # lengths of one stream, each of which is compiled
_WORTH = 0.03  # share of the tokens that another length has to save


def lengths_of(lengths_N: np.ndarray, seq_len: int, most: int = _MOST) -> tuple[int, ...]:
    """Bucket lengths, ascending, that leave the fewest padded tokens when every row goes to the
    shortest bucket that holds it. Multiples of 8, or `seq_len`; the last one holds the longest
    row. At most `most`, and never more than six; fewer where another one would save little."""
    ends = [*range(_MULTIPLE, seq_len, _MULTIPLE), seq_len]
    rows = np.searchsorted(np.sort(lengths_N), ends, side="right").tolist()  # that fit into each
    last = rows.index(len(lengths_N))
    ends, rows = ends[: last + 1], rows[: last + 1]
    # best[e]: (computed tokens of the rows that fit into ends[e], the buckets) with e the last one.
    best = [(n * end, (end,)) for n, end in zip(rows, ends, strict=True)]
    for _ in range(min(most, _MOST) - 1):
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
        if best[last][0] > (1 - _WORTH) * fewer[0]:
            return fewer[1]
    return best[last][1]


class BucketStream(Batches):
    """Batches whose rows share a bucket.

    With a seed, endless: an epoch has n // B batches, at least one. Its rows are shuffled (n % B
    of them, others in every epoch, sit out), each bucket is cut into batches of B, rows that are
    left over go on to the next longer bucket, and the batches are shuffled. What a step holds is
    a function of (seed, step) alone. Without a seed, one pass over all rows, shortest bucket
    first.

    Where rows are lacking (n < B; the last batch of a bucket in one pass), rows of id -1, mask 0
    and weight 0 fill the batch up.
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
        """`make(ids_B, length) -> Batch` makes rows with NumPy (`Encoded.batch`). `batch_size` is
        the global one: process p of k holds the p-th part of every batch's rows.

        Raises UserError when the processes do not divide the batch.
        """
        rows = rows_of_process(len(lengths_N), batch_size, process_count)
        self.size = len(lengths_N)
        self.batch_size = batch_size
        self.buckets = tuple(buckets)
        bucket_N = np.searchsorted(self.buckets, lengths_N)
        if seed is None:
            plan = functools.cache(lambda epoch: _one_pass(bucket_N, batch_size))
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
            return blank_rows(made, ids_B >= 0)

        self._batches = numbers.map_with_index(batch)


def _epoch(bucket_N, batch_size, seed, epoch):
    """(row ids (S, B), bucket of each batch (S,)) of one epoch."""
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


def _one_pass(bucket_N, batch_size):
    """The same for one pass in the order of the rows, bucket after bucket."""
    ids, buckets = [], []
    for bucket in np.unique(bucket_N):
        rows = np.flatnonzero(bucket_N == bucket)
        rows = np.pad(rows, (0, -len(rows) % batch_size), constant_values=-1)
        ids.append(rows.reshape(-1, batch_size))
        buckets += [bucket] * len(ids[-1])
    return np.concatenate(ids), np.array(buckets)
