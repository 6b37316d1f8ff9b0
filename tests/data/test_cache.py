"""Entries of a cache: made once, whole, never anybody else's; see tests/teachers/test_damage.py."""

import errno
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from kd_jax import storage
from kd_jax.data import cache
from kd_jax.errors import UserError

SETTING = "config.cache.folder"


def make(entry, text="whole"):
    return cache.once(entry, lambda made: (made / "x.bin").write_text(text), SETTING)


def names(root):
    """Everything but locks."""
    return sorted(path.name for path in root.iterdir() if not path.name.endswith("lock"))


def partial(entry, pid):
    return entry.with_name(f"{entry.name}.{cache._HOST}.{pid}.partial")


@pytest.fixture(scope="module")
def dead():
    """The number of a process that is no more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_one_writer_at_a_time(tmp_path):
    order = []

    def second():
        with storage.lock(tmp_path / "x.lock"):
            order.append("second")

    with storage.lock(tmp_path / "x.lock"):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.3)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_the_cache_folder_is_the_config_or_the_environment_or_the_home(monkeypatch, tmp_path):
    monkeypatch.setenv("KD_JAX_CACHE", "/from/environment")
    assert str(cache.folder("/from/config")) == "/from/config"
    assert str(cache.folder(None)) == "/from/environment"
    monkeypatch.delenv("KD_JAX_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.folder(None) == tmp_path / ".cache" / "kd_jax"
    assert cache.folder("~/x") == tmp_path / "x"


def test_an_entry_is_made_once_and_whole(tmp_path):
    entry, calls = tmp_path / "new" / "x", []

    def write(made):
        calls.append(made)
        (made / "x.bin").write_text("whole")
        assert not entry.exists()

    assert [cache.once(entry, write, SETTING) for _ in range(2)] == [False, True]
    assert len(calls) == 1 and (entry / "x.bin").read_text() == "whole"
    assert names(entry.parent) == ["x"] and names(entry) == [cache.MARK, "x.bin"]


def test_only_what_is_marked_makes_room(tmp_path, caplog):
    """Not the user's folders, nor links to them, nor what another process is writing."""
    for age, name in enumerate(("new", "kept", "old")):
        make(tmp_path / name)
        os.utime(tmp_path / name, (10**9 - 100 * age, 10**9 - 100 * age))
    size = cache._size(tmp_path / "old")
    mine = tmp_path / "elsewhere" / "mine"
    make(mine)
    (tmp_path / "link").symlink_to(mine)
    (tmp_path / "my_dataset").mkdir()
    (tmp_path / "my_dataset" / "train.csv").write_text("a,b" * size)
    make(tmp_path / "y")
    (tmp_path / "y").rename(partial(tmp_path / "y", os.getppid()))
    before = names(tmp_path)
    with caplog.at_level("INFO", logger="kd_jax"):
        wanted = cache.make_room(tmp_path, size, 3 * size, [tmp_path / "kept"], SETTING)
    assert wanted == 2 * size and names(tmp_path) == [name for name in before if name != "old"]
    assert f"{tmp_path / 'old'} is removed, to make room" in caplog.text
    assert cache.make_room(tmp_path, size, 1.5 * size, [tmp_path / "kept"], SETTING) == wanted
    assert "new" in names(tmp_path)
    cache.make_room(tmp_path, 0, 0, [], SETTING)
    assert names(tmp_path) == [name for name in before if name not in ("old", "new", "kept")]
    assert cache.whole(mine)


def test_what_lies_in_an_entrys_place_is_kept_under_another_name(tmp_path, caplog):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "mine.txt").write_text("mine")
    assert not make(tmp_path / "x") and make(tmp_path / "x")
    (aside,) = tmp_path.glob("x.*.aside")
    assert (aside / "mine.txt").read_text() == "mine" and aside.name in caplog.text


def test_what_killed_processes_left_is_removed(tmp_path, dead, caplog):
    """And nothing of living ones, or of other machines."""
    entry = tmp_path / "x"
    kept = [partial(entry, os.getppid()), partial(entry, 1), tmp_path / f"x.host.{dead}.partial"]
    for path in (*kept, partial(entry, dead), partial(entry, os.getpid())):
        path.mkdir()
        (path / "x.bin").write_text("half")
    with caplog.at_level("INFO", logger="kd_jax"):
        assert not make(entry)
    assert names(tmp_path) == sorted(["x", *(path.name for path in kept)])
    assert f"{partial(entry, dead)} is removed" in caplog.text


@pytest.mark.parametrize("planted", ["x.claim", ".lock", "partial", "x"])
def test_links_that_others_planted_are_not_followed(tmp_path, planted):
    root, victim = tmp_path / "cache", tmp_path / "victim"
    root.mkdir()
    victim.write_text("precious")
    link = partial(root / "x", os.getpid()) if planted == "partial" else root / planted
    link.symlink_to(victim)
    if planted == "x":
        assert not make(root / "x")
    else:
        with pytest.raises(UserError, match=f"cannot write .*{link.name}: .*; set {SETTING} or KD"):
            make(root / "x")
    assert victim.read_text() == "precious"


def test_a_complete_cache_may_be_read_only(tmp_path, monkeypatch):
    make(tmp_path / "x")
    make(tmp_path / "broken")
    (tmp_path / "broken" / "x.bin").write_text("other")

    def read_only(path, *args):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(os, "utime", read_only)
    monkeypatch.setattr(storage, "lock", read_only)
    monkeypatch.setattr(cache, "_create", read_only)
    assert make(tmp_path / "x")
    with pytest.raises(
        UserError, match="cannot write .*y.claim: Read-only file system; set config"
    ):
        make(tmp_path / "y")
    with pytest.raises(UserError, match="cannot write .*broken.claim: Read-only file system"):
        make(tmp_path / "broken")


def test_files_that_cannot_be_written_whole_are_one_line(tmp_path):
    def full(made):
        raise OSError("800 requested and 0 written")  # as NumPy says it

    with pytest.raises(UserError, match="800 requested and 0 written; set config.cache.folder or"):
        cache.once(tmp_path / "x", full, SETTING)
    assert names(tmp_path) == []
    make(tmp_path / "x")
    for root in (tmp_path / "x" / "x.bin", tmp_path / "x" / "x.bin" / "under"):  # a file
        with pytest.raises(UserError, match="cannot write .*x.bin.*: .*; set config.cache.folder"):
            make(root / "y")


def test_files_are_on_disk_before_they_are_renamed(tmp_path, monkeypatch):
    synced, sync = [], os.fsync

    def fsync(number):
        assert not (tmp_path / "x").exists()
        synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{number}")).split(".json")[0])
        sync(number)

    monkeypatch.setattr(os, "fsync", fsync)
    make(tmp_path / "x")
    assert synced == ["x.bin", cache.MARK.removesuffix(".json")]


def test_many_make_and_remove_entries_at_a_time(tmp_path):
    """As runs with a small cache.max_gb do: none of them finds half an entry."""
    make(tmp_path / "0")
    size = cache._size(tmp_path / "0")

    def work(seed):
        for number in np.random.default_rng(seed).integers(0, 6, 40):
            entry = tmp_path / str(number)
            cache.make_room(tmp_path, size, 2.5 * size, [], SETTING)
            make(entry)
            if cache.whole(entry):
                found = cache.entries(tmp_path)
                assert all(each.name in "012345" for each in found)

    with ThreadPoolExecutor(4) as workers:
        list(workers.map(work, range(4)))


def test_ids_are_compared_with_the_vocabulary(tmp_path):
    cache.check_ids(np.array([0, 4]), 5, tmp_path)
    cache.check_ids(np.zeros(0, np.uint16), 0, tmp_path)
    for wrong in ([0, 5], [-1, 2]):
        with pytest.raises(UserError, match=f"{tmp_path} holds token ids from .* a vocabulary of"):
            cache.check_ids(np.array(wrong), 5, tmp_path)


def test_what_cannot_be_read_is_not_blamed_on_the_cache(tmp_path):
    def read(made):
        raise PermissionError(errno.EACCES, "Permission denied", "/elsewhere/text.txt")

    with pytest.raises(PermissionError, match="text.txt"):
        cache.once(tmp_path / "x", read, SETTING)


def claim(entry, holder):
    path = entry.with_name(f"{entry.name}.claim")
    path.write_text(f"process {holder}, 1")
    return path


def test_the_claim_of_a_dead_process_is_taken_over(tmp_path, dead, caplog):
    claim(tmp_path / "x", f"{dead} on {cache._HOST}")
    assert not make(tmp_path / "x") and names(tmp_path) == ["x"]
    assert f"was being made by process {dead} on {cache._HOST}" in caplog.text


def test_another_host_is_waited_for_while_it_shows_signs_of_life(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(cache, "_DEAD", 0.6)
    path = claim(tmp_path / "x", "7 on elsewhere")
    made = []
    thread = threading.Thread(target=lambda: made.append(make(tmp_path / "x")))
    with caplog.at_level("INFO", logger="kd_jax"):
        thread.start()
        for beat in range(15):
            os.utime(path, (beat, beat))
            thread.join(0.1)
            assert thread.is_alive()
        make(tmp_path / "y")
        (tmp_path / "y").rename(tmp_path / "x")  # which is then done
        path.unlink()
        thread.join()
    assert made == [True] and "x is being made by process 7 on elsewhere, 1: waiting" in caplog.text


def test_another_host_that_shows_none_is_taken_for_dead(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(cache, "_DEAD", 0.3)
    claim(tmp_path / "x", "7 on elsewhere")
    assert not make(tmp_path / "x") and names(tmp_path) == ["x"]
    assert "which is gone: begun anew" in caplog.text


def test_a_process_that_makes_an_entry_shows_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "_BEAT", 0.01)

    def write(made):
        path = tmp_path / "x.claim"
        os.utime(path, (1, 1))
        while os.stat(path).st_mtime < 2:
            pass
        (made / "x.bin").write_text("whole")

    assert not cache.once(tmp_path / "x", write, SETTING) and names(tmp_path) == ["x"]


def test_hosts_that_share_a_folder_tokenize_once(tmp_path):
    """Three processes, each under the name of another host; locks between them do not count."""
    program = f"""
import fcntl, time
from pathlib import Path
from kd_jax.data import cache
cache._HOST = __import__("sys").argv[1]
fcntl.flock = lambda *_: None
def write(made):
    (Path({str(tmp_path)!r}) / ("made." + cache._HOST)).touch()
    time.sleep(1)
    (made / "x.bin").touch()
cache.once(Path({str(tmp_path / "cache" / "x")!r}), write, "")
"""
    runs = [subprocess.Popen([sys.executable, "-c", program, host]) for host in "abc"]
    assert [run.wait() for run in runs] == [0, 0, 0]
    assert len(list(tmp_path.glob("made.*"))) == 1 and names(tmp_path / "cache") == ["x"]


def test_after_a_kill_the_next_begins_anew(tmp_path):
    program = f"""
import time
from pathlib import Path
from kd_jax.data import cache
def write(made):
    (made / "half.bin").touch()
    print("writing", flush=True)
    time.sleep(60)
cache.once(Path({str(tmp_path / "x")!r}), write, "")
"""
    run = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    run.stdout.readline()
    run.kill()
    run.wait()
    run.stdout.close()
    assert not make(tmp_path / "x") and names(tmp_path) == ["x"]
    assert names(tmp_path / "x") == [cache.MARK, "x.bin"]
