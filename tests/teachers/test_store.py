import os
import shutil

import numpy as np
import pytest

from kd_jax import storage
from kd_jax.data import cache
from kd_jax.teachers.store import Store, identity

CLASSES = 5


def digests(*numbers):
    return np.array([[number] * 16 for number in numbers], np.uint8).reshape(-1, 16)


def logits(*numbers):
    return [np.arange(CLASSES, dtype=np.float32) + number for number in numbers]


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path, "one", 1.0)


def check(store, *numbers):
    """All of them are there."""
    for found, wanted in zip(store.read(digests(*numbers)), logits(*numbers), strict=True):
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
    assert store.write(digests(1, 2, 3), logits(1, 2, 3))
    assert store.write(digests(7, 4), logits(7, 4))
    check(store, 4, 2, 7, 2, 1, 3)
    check(Store(tmp_path, "one", 1e-9), 3)  # another run, which may write nothing
    found = store.read(digests(3, 9, 1))
    assert found[1] is None and found[2][0] == 1.0
    assert Store(tmp_path, "other", 1.0).read(digests(1)) == [None]


def test_what_another_run_takes_away_meanwhile_is_not_there(store, tmp_path, monkeypatch):
    store.write(digests(1, 2), logits(1, 2))
    (part,) = parts(tmp_path)
    store.write(digests(7, 4), logits(7, 4))
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
    store.write(digests(1, 2, 3), rows)
    for found, wanted in zip(store.read(digests(3, 1, 2)), [rows[2], *rows[:2]], strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_the_same_rows_again_are_one_part(store, tmp_path):
    for _ in range(2):
        store.write(digests(1, 2), logits(1, 2))
    assert len(parts(tmp_path)) == 1


@pytest.mark.parametrize("killed", [0, 1, 2])
def test_what_a_crash_leaves_is_not_read(store, tmp_path, killed, monkeypatch):
    store.write(digests(1), logits(1))
    calls, save = iter(range(9)), np.save

    def fail(file, array):
        save(file, array)
        if next(calls) == killed:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(np, "save", fail)
        patched.setattr(shutil, "rmtree", lambda *args, **kwargs: None)  # as after a kill
        with pytest.raises(KeyboardInterrupt):
            store.write(digests(2, 3), logits(2, 3))
    assert len(parts(tmp_path)) == 2
    check(store, 1)
    assert store.read(digests(2)) == [None]
    store.write(digests(2, 3), logits(2, 3))
    check(store, 3, 1, 2)
    assert parts(tmp_path) == cache.entries(tmp_path)


ROW_GB = CLASSES * 4 / 1e9


def test_too_much_is_not_written(tmp_path, caplog):
    store = Store(tmp_path, "one", 2.5 * ROW_GB)
    other = Store(tmp_path, "other", 1.0)
    other.write(digests(1), logits(1))
    assert not store.write(digests(1, 2, 3), logits(1, 2, 3))
    assert "exceed cache.max_gb=5e-08" in caplog.text
    assert not parts(tmp_path, "one")
    check(other, 1)  # nothing had to go


def test_others_go_the_longest_unused_first(tmp_path):
    for seconds, name in ((300, "oldest"), (400, "read"), (100, "newest")):
        Store(tmp_path, name, 1.0).write(digests(1), logits(1))
        age(tmp_path, name, seconds)
    check(Store(tmp_path, "read", 1.0), 1)  # it was of use
    size = sum(file.stat().st_size for file in parts(tmp_path)[0].iterdir()) / 1e9
    assert Store(tmp_path, "own", 2.5 * size).write(digests(1), logits(1))
    assert [path.name.split("-")[0] for path in parts(tmp_path)] == ["newest", "own", "read"]
    check(Store(tmp_path, "own", 1.0), 1)


def test_a_folder_that_cannot_be_written_costs_no_logits(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    assert not Store(tmp_path / "file", "one", 1.0).write(digests(1), logits(1))
    assert (
        "for this run alone: cannot write" in caplog.text and "config.cache.folder" in caplog.text
    )


def test_a_part_is_checked_at_its_first_use(tmp_path, monkeypatch):
    """The logits, which may be many; what rows there are is a little at once."""
    store = Store(tmp_path, "one", 1.0)
    store.write(digests(1, 2), logits(1, 2))
    store.write(digests(3), logits(3))
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
