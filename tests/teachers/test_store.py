import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from kd_jax import storage
from kd_jax.data import cache
from kd_jax.errors import UserError
from kd_jax.teachers.store import LogitStore, identity
from kd_jax.types import StoredLogits

CLASSES, V = 5, 11


def digests(*numbers):
    return [bytes([number] * 16) for number in numbers]


def logits(*numbers):
    return [np.arange(CLASSES, dtype=np.float32)[None] + number for number in numbers]


def write(store, numbers, rows=None):
    rows = logits(*numbers) if rows is None else rows
    sizes = [row.shape for row in rows]
    store.write(digests(*numbers), sizes, map(StoredLogits, rows))


def values(store, *numbers):
    return [row and row.values_BPK for row in store.read(digests(*numbers))]


def largest(number):
    """Three of V logits at as many positions as the number says."""
    values = 100 * number + np.arange(3 * number, dtype=np.float32).reshape(-1, 3)
    ids = np.argsort(np.sin(values), axis=1).astype(np.int32)
    return StoredLogits(values, ids, values[:, 0] + 0.5)


def sparse(root, name="one", max_gb=1.0):
    return LogitStore(root, name, max_gb, V)


def write_largest(store, numbers, rows=None):
    rows = map(largest, numbers) if rows is None else rows
    store.write(digests(*numbers), [(number, 3) for number in numbers], rows)


@pytest.fixture
def store(tmp_path):
    return LogitStore(tmp_path, "one", 1.0)


def check(store, *numbers):
    """All of them are there."""
    for found, wanted in zip(values(store, *numbers), logits(*numbers), strict=True):
        np.testing.assert_array_equal(found, wanted)


def parts(root, name="*"):
    return sorted(root.glob(f"{name}-*/"))


def age(root, name, seconds):
    """As if it had been used so long ago."""
    (part,) = parts(root, name)
    then = part.stat().st_mtime - seconds
    os.utime(part, (then, then))


def test_rows_are_found_by_content_in_any_order(store, tmp_path):
    assert store.read(digests(1, 2)) == [None, None]
    write(store, (1, 2, 3))
    write(store, (7, 4))
    check(store, 4, 2, 7, 2, 1, 3)
    check(LogitStore(tmp_path, "one", 1e-9), 3)  # another run, which may write nothing
    found = values(store, 3, 9, 1)
    assert found[1] is None and found[2][0, 0] == 1.0
    assert LogitStore(tmp_path, "other", 1.0).read(digests(1)) == [None]


def test_what_another_run_takes_away_meanwhile_is_not_there(store, tmp_path, monkeypatch):
    write(store, (1, 2))
    (part,) = parts(tmp_path)
    write(store, (7, 4))
    with monkeypatch.context() as patched:

        def whole(entry, *names):  # it goes between the look and the reading
            if entry == part:
                shutil.rmtree(part)
            return True

        patched.setattr(cache, "whole", whole)
        assert store.read(digests(1))[0] is None
    check(store, 4, 7)


def test_rows_of_several_answers_are_ragged(store):
    rng = np.random.default_rng(0)
    rows = [rng.normal(size=(2, length)).astype(np.float32) for length in (7, 3, 11)]
    write(store, (1, 2, 3), rows)
    for found, wanted in zip(values(store, 3, 1, 2), [rows[2], *rows[:2]], strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_the_same_rows_again_are_one_part(store, tmp_path):
    for _ in range(2):
        write(store, (1, 2))
    assert len(parts(tmp_path)) == 1


@pytest.mark.parametrize("killed", [0, 1, "a row"])
def test_what_a_crash_leaves_is_not_read(store, tmp_path, killed, monkeypatch):
    write(store, (1,))
    calls, save = iter(range(9)), np.save

    def rows():
        yield from logits(2)
        if killed == "a row":
            raise KeyboardInterrupt
        yield from logits(3)

    def fail(file, array):
        save(file, array)
        if next(calls) == killed:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(np, "save", fail)
        patched.setattr(shutil, "rmtree", lambda *args, **kwargs: None)  # as after a kill
        with pytest.raises(KeyboardInterrupt):
            sizes = [(1, CLASSES)] * 2
            store.write(digests(2, 3), sizes, map(StoredLogits, rows()))
    assert len(parts(tmp_path)) == 2
    check(store, 1)
    assert store.read(digests(2)) == [None]
    write(store, (2, 3))
    check(store, 3, 1, 2)
    assert parts(tmp_path) == cache.entries(tmp_path)


ROW_GB = CLASSES * 4 / 1e9


def test_too_much_is_not_written(tmp_path):
    store = LogitStore(tmp_path, "one", 2.5 * ROW_GB)
    other = LogitStore(tmp_path, "other", 1.0)
    write(other, (1,))
    with pytest.raises(UserError, match="6e-08 GB are wanted in .*max_gb=5e-08; raise it, or keep"):
        write(store, (1, 2, 3))
    assert not parts(tmp_path, "one")
    check(other, 1)  # nothing had to go


def test_others_go_the_longest_unused_first(tmp_path):
    for seconds, name in ((300, "oldest"), (400, "read"), (100, "newest")):
        write(LogitStore(tmp_path, name, 1.0), (1,))
        age(tmp_path, name, seconds)
    check(LogitStore(tmp_path, "read", 1.0), 1)  # it was of use
    size = sum(file.stat().st_size for file in parts(tmp_path)[0].iterdir()) / 1e9
    write(LogitStore(tmp_path, "own", 2.5 * size), (1,))
    assert [path.name.split("-")[0] for path in parts(tmp_path)] == ["newest", "own", "read"]
    check(LogitStore(tmp_path, "own", 1.0), 1)


@pytest.mark.parametrize("others", [0, 1])
def test_what_is_in_use_stays(tmp_path, others):
    """By a store itself, and by those that it is told of."""
    stores = [LogitStore(tmp_path, name, 1.0) for name in ("own", "told", "other")]
    for store in stores:
        write(store, (1,))
        check(store, 1)
    size = sum(file.stat().st_size for file in parts(tmp_path)[0].iterdir()) / 1e9
    stores[0]._max_bytes = (1.2 + others) * 1e9 * size
    rows, sizes = map(StoredLogits, logits(2)), [(1, CLASSES)]
    stores[0].write(digests(2), sizes, rows, stores[1 : 1 + others])
    left = [path.name.split("-")[0] for path in parts(tmp_path)]
    assert left == ["own", "own"] + ["told"] * others


def test_the_largest_logits_come_back_with_their_ids(tmp_path):
    write_largest(sparse(tmp_path), (2, 5, 0, 3))
    write_largest(sparse(tmp_path), (4,))
    for found, number in zip(sparse(tmp_path).read(digests(4, 0, 3, 2)), (4, 0, 3, 2), strict=True):
        for name in ("values_BPK", "ids_BPK", "rest_BP"):
            np.testing.assert_array_equal(getattr(found, name), getattr(largest(number), name))


def test_ids_are_compared_with_the_vocabulary(tmp_path):
    spoilt = largest(2)
    spoilt.ids_BPK[1, 2] = V
    write_largest(sparse(tmp_path), (2,), [spoilt])
    with pytest.raises(UserError, match="one-.* holds token ids from 0 to 11, beyond a vocabulary"):
        sparse(tmp_path).read(digests(2))


def test_other_rows_than_were_announced_are_not_written(tmp_path):
    with pytest.raises(ValueError, match="shorter"):
        write_largest(sparse(tmp_path), (2, 3), [largest(2)])
    assert not parts(tmp_path)


def test_the_size_is_known_before(tmp_path, monkeypatch):
    sizes, make_room = [], cache.make_room

    def note(root, size, *others):
        sizes.append(size)
        return make_room(root, size, *others)

    monkeypatch.setattr(cache, "make_room", note)
    write_largest(sparse(tmp_path), (2, 5))
    (part,) = parts(tmp_path)
    written = [(part / f"{name}.npy").stat().st_size - 128 for name in ("logits", "ids", "rest")]
    assert sizes == [sum(written)]


def test_programs_that_want_the_same_wait_for_the_first(tmp_path):
    computed, begun, go_on = [], threading.Event(), threading.Event()

    def slowly():
        computed.append(0)
        begun.set()
        assert go_on.wait(20)
        yield largest(2)

    with ThreadPoolExecutor(2) as programs:
        call = lambda: write_largest(sparse(tmp_path), (2,), slowly())  # noqa: E731
        both = [programs.submit(call) for _ in range(2)]
        assert begun.wait(20)
        time.sleep(0.2)  # for the second to come as far
        go_on.set()
        assert [each.result() for each in both] == [None, None]
    assert len(computed) == 1 and len(parts(tmp_path)) == 1


def test_entries_of_earlier_versions_are_read(store, tmp_path):
    """They had all arrays at once, and np.save."""

    def save(folder):
        flat = np.concatenate([row.reshape(-1) for row in logits(4, 7)])
        sizes = np.array([(1, CLASSES)] * 2)
        rows = np.frombuffer(b"".join(digests(4, 7)), np.uint8).reshape(2, 16)
        for name, array in (("digests", rows), ("sizes", sizes), ("logits", flat)):
            np.save(folder / f"{name}.npy", array)

    cache.once(tmp_path / "one-0123456789abcdef", save, "config.cache.folder")
    check(store, 7, 4)


def test_a_part_is_checked_at_its_first_use(tmp_path, monkeypatch):
    """The logits, which may be many; what rows there are is a little at once."""
    store = LogitStore(tmp_path, "one", 1.0)
    write(store, (1, 2))
    write(store, (3,))
    looked, digest = [], storage.digest

    def watched(path):
        looked.append(path.name)
        return digest(path)

    monkeypatch.setattr(storage, "digest", watched)
    check(store, 1, 2)
    assert looked.count("logits.npy") == 1
    check(store, 1, 3)
    assert looked.count("logits.npy") == 2


def test_identity_is_weights_and_types():
    params = {"a": {"kernel": np.ones((2, 3), np.float32)}, "b": np.zeros(3, np.float32)}
    name = identity(params, ("bert", "fp32"))
    assert len(name) == 32 and name == identity(params, ("bert", "fp32"))
    others = [
        identity(params, ("bert", "bf16")),
        identity(params | {"b": np.float32([0, 0, 1e-7])}, ("bert", "fp32")),
        identity({"a": params["a"], "c": params["b"]}, ("bert", "fp32")),
    ]
    assert len({name, *others}) == 4
