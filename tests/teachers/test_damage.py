"""Damage to any file of a cache: what is read is as undisturbed, and a line names the file."""

import os
from pathlib import Path

import numpy as np
import pytest

from kd_jax.data import cache
from kd_jax.data.encoded import Marked
from kd_jax.teachers.store import LogitStore
from tests.data import test_blocks
from tests.teachers import test_store

ROWS = [np.arange(12, dtype=np.float32).reshape(2, 6) / 7, np.ones((1, 5), np.float32) / 3]


def tokens(root: Path) -> list:
    texts, tokenizer = test_blocks.listed(["a b", "c", "d d"]), test_blocks.tokenizer()
    return [np.array(test_blocks.tokenize(texts, tokenizer, test_blocks.END, root))]


def chats(root: Path) -> list:
    rows = [(np.array([1, 2, 3]), np.array([1, 0, 1])), (np.array([4]), np.array([1]))]

    def write(folder: Path) -> None:
        Marked.write(folder, [rows], np.uint16)

    cache.once(root / "chats-x", write, "config.data.cache_dir")
    found = Marked.load(root / "chats-x")
    return [array for row in range(2) for array in found[row]]


def logits(root: Path) -> list:
    store = LogitStore(root, "a" * 32, 1.0)
    for numbers, rows in (((1, 2), ROWS), ((3,), ROWS[1:])):
        if any(row is None for row in test_store.values(store, *numbers)):
            test_store.write(store, numbers, rows)
    return [np.array(row) for row in test_store.values(store, 1, 2, 3)]


def largest(root: Path) -> list:
    store, digests = test_store.sparse(root), test_store.digests
    for numbers in ((1, 2), (3,)):
        if any(row is None for row in store.read(digests(*numbers))):
            test_store.write_largest(store, numbers)
    rows = store.read(digests(1, 2, 3))
    return [np.array(x) for row in rows for x in (row.values_BPK, row.ids_BPK, row.rest_BP)]


KINDS = (tokens, chats, logits, largest)  # each reads, and makes what is not there


def flip(at):
    def damage(path):
        data = bytearray(path.read_bytes())
        data[int(at * (len(data) - 1))] ^= 0x04
        path.write_bytes(data)

    return damage


DAMAGES = {
    "the first byte": flip(0),
    "a byte within": flip(0.6),
    "the last byte": flip(1),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-3]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "emptied": lambda path: path.write_bytes(b""),
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_damage_to_any_file_of_a_cache_is_said_and_mended(kind, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda number: None)  # sooner
    wanted = kind(tmp_path)
    files = [path for path in sorted(tmp_path.rglob("*")) if path.is_file() and path.stat().st_size]
    assert len(files) > 1 and {cache.MARK} < {file.name for file in files}
    for name, damage in DAMAGES.items():
        for file in files:
            caplog.clear()
            damage(file)
            np.testing.assert_equal(kind(tmp_path), wanted)
            if file.name != cache.MARK:
                assert f"{file} is damaged" in caplog.text
            elif name not in ("longer", "the last byte"):  # white space: still as good
                said = (
                    f"{file.parent}/",
                    f"{file.parent} has no {cache.MARK}",
                )  # a digest blames its file
                assert any(line in caplog.text for line in said)
    assert all(map(cache.whole, cache.entries(tmp_path)))
