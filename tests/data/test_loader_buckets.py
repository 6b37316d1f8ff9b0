import itertools

import jax
import numpy as np
import pytest

from kd_jax.data.loader import BucketStream, lengths_of, lengths_of_pass
from kd_jax.errors import UserError
from kd_jax.types import Batch

LENGTHS = np.random.default_rng(0).integers(3, 40, 45)


def make(ids_B, length):
    ones_B1 = np.ones((len(ids_B), 1), np.float32)
    return Batch(
        ids_B=ids_B.astype(np.int32),
        tokens_BT=np.repeat(ids_B[:, None], length, axis=1).astype(np.int32),
        mask_BT=(np.arange(length) < LENGTHS[ids_B % 45][:, None]).astype(np.float32),
        labels=ids_B[:, None].astype(np.int32),
        weights=ones_B1,
    )


def stream(size=45, batch_size=4, seed=0, **keys):
    return BucketStream(LENGTHS[:size], (16, 24, 40), make, batch_size, seed=seed, **keys)


def same(a, b):
    return jax.tree.all(jax.tree.map(np.array_equal, a, b))


def test_bucket_lengths_leave_the_fewest_padded_tokens():
    rng = np.random.default_rng(1)
    for seq_len, longest in ((50, 50), (64, 60), (48, 30), (20, 20)):
        lengths = rng.integers(2, longest + 1, 200)
        found = lengths_of(lengths, seq_len)

        def cost(buckets, lengths=lengths):
            return sum(min(b for b in buckets if b >= n) for n in lengths.tolist())

        ends = [*range(8, seq_len, 8), seq_len]
        last = next(end for end in ends if end >= lengths.max())
        below = [end for end in ends if end < last]

        def least(count, last=last, below=below, cost=cost):
            chosen = itertools.combinations(below, count - 1)
            return min(cost((*lengths, last)) for lengths in chosen)

        assert cost(found) == least(len(found))
        assert found[-1] == last and list(found) == sorted(found) and len(found) <= 6
        if len(found) > 1:  # the last one was worth it, and another would not have been
            assert cost(found) < 0.97 * least(len(found) - 1)
        if len(found) < 6 and len(found) <= len(below):
            assert least(len(found) + 1) > 0.97 * cost(found)


def test_a_length_that_saves_little_is_not_taken():
    lengths = np.array([64] * 990 + [56] * 10)
    assert lengths_of(lengths, 64) == (64,)
    assert lengths_of(np.array([64] * 500 + [32] * 500), 64) == (32, 64)


def test_no_bucket_is_empty():
    assert lengths_of(np.array([5, 7]), 128) == (8,)
    assert lengths_of(np.array([5, 100]), 128) == (8, 104)
    assert lengths_of(np.array([126]), 126) == (126,)


def test_lengths_of_a_pass_leave_the_fewest_padded_tokens_in_its_batches():
    lengths = np.minimum(np.random.default_rng(3).geometric(0.12, 98) + 1, 30)

    def computed(buckets):
        of_pass = BucketStream(lengths, buckets, make, 8)
        return sum(of_pass[step].tokens_BT.size for step in range(of_pass.steps))

    found = lengths_of_pass(lengths, 30, 8)
    assert len(found) == 4  # 13 batches
    ends = [*range(4, 30, 4), 30]
    choices = itertools.combinations(ends[:-1], 3)
    assert computed(found) == min(computed((*shorter, 30)) for shorter in choices)
    assert computed(found) < computed(lengths_of(lengths, 30))
    # One where others save little, or batches are few.
    assert lengths_of_pass(np.array([64] * 199 + [60]), 64, 2) == (64,)
    assert lengths_of_pass(np.array([3] * 30 + [29]), 64, 8) == (32,)


def test_an_epoch_holds_every_row_at_most_once_in_buckets_of_their_length():
    made = stream()
    assert made.steps is None and made.steps_per_epoch == 11
    left_out = []
    for epoch in range(3):
        batches = [made[11 * epoch + step] for step in range(11)]
        ids = np.concatenate([batch.ids_B for batch in batches])
        assert len(set(ids.tolist())) == 44 and ids.min() >= 0
        left_out += set(range(45)) - set(ids.tolist())
        lengths = [batch.tokens_BT.shape[1] for batch in batches]
        assert set(lengths) == {16, 24, 40} and lengths != sorted(lengths)
        for batch in batches:
            assert (batch.mask_BT.sum(axis=1) == LENGTHS[batch.ids_B]).all()
        # Only rows that were left over sit in a longer bucket: fewer than a batch a bucket.
        longer = sum(
            (
                np.searchsorted((16, 24), LENGTHS[b.ids_B])
                < np.searchsorted((16, 24), b.tokens_BT.shape[1])
            ).sum()
            for b in batches
        )
        assert longer < 2 * 4
    assert len(set(left_out)) > 1


def test_steps_are_a_function_of_the_seed():
    assert all(same(stream(seed=3)[step], stream(seed=3)[step]) for step in (0, 5, 40))
    orders = {
        tuple(np.concatenate([stream(seed=seed)[11 * e + s].ids_B for s in range(11)]).tolist())
        for seed in range(3)
        for e in range(3)
    }
    assert len(orders) == 9  # the sum of seed and epoch does not decide


@pytest.mark.parametrize("seed", [3, None])
def test_processes_share_the_global_batches(seed):
    whole = stream(batch_size=8, seed=seed)
    parts = [stream(batch_size=8, seed=seed, process_index=p, process_count=4) for p in range(4)]
    for step in range(whole.steps or 12):
        joined = jax.tree.map(lambda *a: np.concatenate(a), *(part[step] for part in parts))
        assert same(joined, whole[step])


@pytest.mark.parametrize("start", [0, 7])
def test_prefetched_batches_are_those_of_random_access_from_any_step(start):
    made = stream()
    for step, batch in zip(range(start, start + 30), made.batches(start), strict=False):
        assert same(batch, made[step])


def test_one_pass_covers_every_row_in_the_order_of_length():
    made = stream(batch_size=4, seed=None)
    batches = list(made.batches())
    assert len(batches) == made.steps == made.steps_per_epoch == 12
    ids = np.concatenate([batch.ids_B for batch in batches])
    assert (ids[:3] == -1).all() and sorted(ids[3:].tolist()) == list(range(45))
    assert (np.diff(LENGTHS[ids[3:]]) >= 0).all()
    for batch in batches:
        blank = batch.ids_B < 0
        assert (batch.weights[:, 0] == ~blank).all() and not batch.mask_BT[blank].any()
        longest = max(b for b in (0, 16, 24) if b < batch.tokens_BT.shape[1])
        assert LENGTHS[batch.ids_B[~blank]].max() > longest


@pytest.mark.parametrize("batch_size", [4, 7, 16])
def test_one_pass_computes_no_more_than_sorted_batches_in_these_lengths(batch_size):
    """Filling every bucket's last batch with blank rows took up to a batch a bucket more."""
    computed = sum(b.tokens_BT.size for b in stream(batch_size=batch_size, seed=None).batches())
    longest_first = np.sort(LENGTHS)[::-1]
    cut = longest_first[::batch_size]  # the longest of each batch
    assert computed == batch_size * sum(min(b for b in (16, 24, 40) if b >= n) for n in cut)


def test_fewer_rows_than_a_batch():
    made = stream(size=3, batch_size=8)
    assert made.steps_per_epoch == 1
    for step in range(3):
        batch = made[step]
        assert sorted(batch.ids_B.tolist()) == [-1] * 5 + [0, 1, 2]
        assert (batch.weights[:, 0] == (batch.ids_B >= 0)).all()


def test_map_changes_the_batches_of_a_copy():
    made = stream()
    changed = made.map(lambda batch: batch.replace(labels=batch.labels + 1))
    assert (changed[3].labels == made[3].labels + 1).all()
    assert (next(changed.batches(3)).labels == made[3].labels + 1).all()


def test_mistakes():
    with pytest.raises(UserError, match="batch_size=10 cannot be divided among 4 processes"):
        stream(batch_size=10, process_count=4)
    with pytest.raises(ValueError, match="at least one row"):
        stream(size=0)
