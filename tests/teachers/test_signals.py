import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from kd_jax.data import cache
from kd_jax.errors import UserError
from kd_jax.teachers import signals
from kd_jax.types import Batch, Signal

V, T = 11, 6
COUNTS = np.array([2, 5, 0, 3])


def rows(ids):
    """Batches of rows with as many learnt tokens as COUNTS says, somewhere in the row."""
    weights = np.zeros((len(ids), T), np.float32)
    for b, row in enumerate(ids):
        if row >= 0:
            weights[b, 1 : 1 + COUNTS[row]] = 0.5
    tokens = np.zeros((len(ids), T), np.int32)
    return Batch(np.array(ids), tokens, weights, tokens, weights)


def value(row, token, k):
    return 100 * row + 10 * token + np.arange(k, dtype=np.float32)


def signal(batch, k):
    """What `value` says of every token, learnt or not."""
    values = np.array([[value(row, t, k) for t in range(T)] for row in batch.ids_B], np.float32)
    if k == V:
        return Signal(values)
    ids = np.argsort(np.sin(values * 7 + np.arange(k)), axis=-1).astype(np.int32)
    return Signal(values, ids, values[..., 0] + 0.5)


def made(folder, k, order=((2, 1), (0, 3)), name="one"):
    batches = [rows(ids) for ids in order]
    return written(folder / name, lambda: ((b, signal(b, k)) for b in batches))


def written(folder, compute):
    return signals.written(folder, COUNTS, V, compute, "teacher")


def folders(root):
    return sorted(path.name for path in root.iterdir() if path.is_dir())


@pytest.mark.parametrize("k", [V, 3])
def test_what_was_computed_comes_back_in_any_order(tmp_path, k):
    found = made(tmp_path, k)
    for ids in ([0, 1], [3, -1], [2, 3], [1, 1]):
        batch = rows(ids)
        got, wanted = found.of(batch), signal(batch, k)
        learnt = batch.weights > 0
        np.testing.assert_array_equal(got.values_BTK[learnt], wanted.values_BTK[learnt])
        assert not got.values_BTK[~learnt].any()
        if k < V:
            np.testing.assert_array_equal(got.ids_BTK[learnt], wanted.ids_BTK[learnt])
            np.testing.assert_array_equal(got.rest_BT[learnt], wanted.rest_BT[learnt])
        else:
            assert got.ids_BTK is None
    assert found.k == k


def test_it_is_computed_once(tmp_path):
    made(tmp_path, 3)
    found = written(tmp_path / "one", lambda: pytest.fail("computed again"))
    assert found.k == 3
    assert folders(tmp_path) == ["one"]


def test_programs_that_want_the_same_wait_for_the_first(tmp_path):
    computed, begun, go_on = [], threading.Event(), threading.Event()

    def slowly():
        computed.append(0)
        begun.set()
        assert go_on.wait(20)
        batch = rows([2, 1])
        yield batch, signal(batch, 3)
        batch = rows([0, 3])
        yield batch, signal(batch, 3)

    with ThreadPoolExecutor(2) as programs:
        both = [programs.submit(written, tmp_path / "one", slowly) for _ in range(2)]
        assert begun.wait(20)
        time.sleep(0.2)  # for the second to come as far
        go_on.set()
        assert [each.result().k for each in both] == [3, 3]
    assert len(computed) == 1 and folders(tmp_path) == ["one"]


def test_what_a_crash_leaves_is_not_read(tmp_path):
    def dies():
        batch = rows([0, 1])
        yield batch, signal(batch, 3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        written(tmp_path / "one", dies)
    assert not (tmp_path / "one").exists()
    made(tmp_path, 3)
    assert folders(tmp_path) == ["one"]


def test_other_rows_are_noticed(tmp_path):
    found = made(tmp_path, 3)
    with pytest.raises(ValueError, match="has 10 tokens, not 11"):
        signals.Signals(found.folder, np.array([2, 5, 1, 3]), V)


def test_ids_are_compared_with_the_vocabulary(tmp_path):
    batch = rows([1, 3])
    spoilt = signal(batch, 3)
    spoilt.ids_BTK[1, 2, 0] = V
    with pytest.raises(UserError, match="one holds token ids from 0 to 11, beyond a vocabulary of"):
        written(tmp_path / "one", lambda: [(batch, spoilt)])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_not_kept(tmp_path, value):
    batch = rows([1, 3])
    spoilt = signal(batch, V)
    spoilt.values_BTK[1, 2, 4] = value  # token of row 3
    spoilt.values_BTK[0, 0] = value  # not learnt: of no matter
    with pytest.raises(UserError, match="teacher: its logits of row 3 are not finite; its weights"):
        written(tmp_path / "one", lambda: [(batch, spoilt)])
    assert folders(tmp_path) == []


def test_names_tell_parts_apart():
    names = {cache.key(*parts) for parts in (("a", "b"), ("ab", ""), ("a", 1), ("a", 2))}
    assert len(names) == 4


def test_all_logits_are_kept_where_they_fit(tmp_path):
    made(tmp_path, 3)
    size = sum(
        (tmp_path / "one" / f"{n}.npy").stat().st_size - 128 for n in ("values", "ids", "rest")
    )
    assert signals.size_of(10, 3, V) == size
    assert signals.kept(1000, V, 3, 3 * 4 * 1000 * V) == V
    assert signals.kept(1000, V, 3, 3 * 4 * 1000 * V - 1) == 3
    assert signals.kept(1000, V, V + 1, 0) == V


def test_room_is_made_by_what_was_unused_longest(tmp_path):
    for age, name in enumerate(("new", "kept", "old")):
        made(tmp_path, 3, name=name)
        then = 1_700_000_000 - 100 * age
        os.utime(tmp_path / name, (then, then))
    size = sum(file.stat().st_size for file in (tmp_path / "old").iterdir())
    signals.make_room(tmp_path, size, 3 * size, {"kept"})
    assert folders(tmp_path) == ["kept", "new"]
    with pytest.raises(UserError, match="are wanted in .*; raise it, or lower config.ens"):
        signals.make_room(tmp_path, size, 1.5 * size, {"kept"})
    assert folders(tmp_path) == ["kept", "new"]
