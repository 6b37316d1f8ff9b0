import time

import numpy as np
import pytest

from kd_jax.data import loader
from kd_jax.data.loader import Stream
from kd_jax.errors import UserError
from kd_jax.types import Batch


def make(ids_B, epochs_B):
    """Rows that tell their epoch in `tokens`."""
    ones_B1 = np.ones((len(ids_B), 1), np.float32)
    return Batch(
        ids_B=ids_B.astype(np.int32),
        tokens_BT=epochs_B[:, None].astype(np.int32),
        mask_BT=ones_B1,
        labels=ids_B[:, None].astype(np.int32),
        weights=ones_B1,
    )


def stream(size=10, batch_size=4, seed=0, **keys):
    return Stream(size, make, batch_size, seed=seed, **keys)


def positions(made, steps):
    """[(epoch, id)] of the first steps."""
    batches = [made[step] for step in range(steps)]
    epochs = np.concatenate([batch.tokens_BT[:, 0] for batch in batches])
    return list(
        zip(epochs.tolist(), np.concatenate([b.ids_B for b in batches]).tolist(), strict=True)
    )


def test_threads_by_cores():
    found = [(cores, loader.read_options(cores)) for cores in (1, 2, 16, 100)]
    assert [(n, o.num_threads, o.prefetch_buffer_size) for n, o in found] == [
        (1, 2, 4),
        (2, 2, 4),
        (16, 4, 8),
        (100, 16, 32),
    ]


def test_every_epoch_holds_every_row_once_in_an_order_of_its_own():
    order = positions(stream(), 10)
    epochs = [order[start : start + 10] for start in range(0, 40, 10)]
    for number, epoch in enumerate(epochs):
        assert sorted(epoch) == [(number, i) for i in range(10)]
    orders = {tuple(i for _, i in epoch) for epoch in epochs}
    assert len(orders) == 4 and tuple(range(10)) not in orders


def test_seeds_share_no_epoch():
    # The sum of seed and epoch must not decide the order.
    orders = set()
    for seed in range(5):
        order = [i for _, i in positions(stream(size=20, seed=seed), 20)]
        orders |= {tuple(order[start : start + 20]) for start in range(0, 80, 20)}
    assert len(orders) == 20
    assert positions(stream(seed=7), 9) == positions(stream(seed=7), 9)


@pytest.mark.parametrize("seed", [3, None])
@pytest.mark.parametrize("processes", [2, 8])
def test_processes_share_the_global_batches(processes, seed):
    whole = stream(size=45, batch_size=16, seed=seed)
    parts = [
        stream(size=45, batch_size=16, seed=seed, process_index=p, process_count=processes)
        for p in range(processes)
    ]
    assert {part.steps for part in parts} == {whole.steps}
    for step in range(3 if seed is None else 8):
        rows = [part[step] for part in parts]
        for name in ("ids_B", "tokens_BT", "mask_BT", "labels", "weights"):
            joined = np.concatenate([getattr(row, name) for row in rows])
            assert (joined == getattr(whole[step], name)).all()


@pytest.mark.parametrize("start", [0, 5])
def test_prefetched_batches_are_those_of_random_access_from_any_step(start):
    made = stream()
    for step, batch in zip(range(start, start + 40), made.batches(start), strict=False):
        assert (batch.ids_B == made[step].ids_B).all()
        assert (batch.tokens_BT == made[step].tokens_BT).all()


def test_few_batches_wait():
    made = []
    counted = stream().map(lambda batch: made.append(batch) or batch)
    batches = counted.batches()
    next(batches)
    time.sleep(0.2)  # for threads that go on making them
    assert len(made) <= 5


def test_batches_may_be_larger_than_the_data_or_a_single_row():
    whole = positions(stream(size=3, batch_size=8), 3)
    assert sorted(whole) == [(epoch, i) for epoch in range(8) for i in range(3)]
    assert positions(stream(size=3, batch_size=1), 24) == whole
    second = stream(size=3, batch_size=2, process_index=1, process_count=2)
    assert positions(second, 12) == whole[1::2]


def test_one_pass_in_order_ends_with_blank_rows():
    made = stream(size=10, batch_size=4, seed=None)
    batches = list(made.batches())
    assert made.steps == len(batches) == 3
    ids = np.concatenate([batch.ids_B for batch in batches])
    assert ids.tolist() == [*range(10), -1, -1]
    last = batches[-1]
    assert last.mask_BT[:, 0].tolist() == last.weights[:, 0].tolist() == [1, 1, 0, 0]
    assert last.labels.min() >= 0  # blank rows still hold valid tokens
    assert {batch.tokens_BT.shape for batch in batches} == {(4, 1)}
    assert [batch.ids_B.dtype for batch in batches] == [np.int32] * 3
    assert len(list(made.batches(2))) == 1


def test_errors_of_the_threads_reach_the_caller():
    def fail(ids_B, epochs_B):
        raise UserError("row 3 is broken")

    with pytest.raises(UserError, match="row 3 is broken"):
        next(Stream(10, fail, 4, seed=0).batches())


def test_processes_must_divide_the_batch():
    with pytest.raises(UserError, match="batch_size=10 cannot be divided among 4 processes"):
        stream(batch_size=10, process_count=4)


def test_chosen_rows_alone():
    chosen = np.array([7, 2, 5])
    once = stream(batch_size=2).chosen(chosen)
    assert [batch.ids_B.tolist() for batch in once.batches()] == [[7, 2], [5, -1]]
    shuffled = stream(batch_size=3).chosen(chosen, seed=1)
    epochs = [sorted(i for _, i in positions(shuffled, 4)[n : n + 3]) for n in (0, 3, 6, 9)]
    assert epochs == [[2, 5, 7]] * 4


def test_a_later_and_a_changed_stream():
    whole = stream()
    later = whole.later(3).map(lambda batch: batch.replace(weights=batch.weights * 2))
    for step in range(4):
        np.testing.assert_array_equal(later[step].ids_B, whole[step + 3].ids_B)
        assert later[step].weights.max() == 2
    batches = later.batches(2)
    np.testing.assert_array_equal(next(batches).ids_B, whole[5].ids_B)
