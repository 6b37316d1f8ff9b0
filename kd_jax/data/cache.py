"""Keeps a cache on disk: folders that are made once and found again by a hash of their sources.

    ROOT/NAME/kd_jax-cache.json   digests of the entry's files, written last: compared when these
                                  are read, and the mark without which nothing is removed
    ROOT/NAME.HOST.PID.partial/   an entry that a process is making, or removing
    ROOT/NAME.claim               names the process that makes an entry; the others, also on other
                                  hosts that share the folder, wait until it is done or dead
    ROOT/.lock                    held while entries come and go

NAME is a hash of whatever the entry was made from. A damaged entry counts as missing: it is logged
and removed, so that it is made again.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import numpy as np

from kd_jax import storage
from kd_jax.errors import UserError

log = logging.getLogger(__name__)

MARK = "kd_jax-cache.json"
_HOST = socket.gethostname()
_PARTIAL = re.compile(rf".+\.{re.escape(_HOST)}\.(\d{{1,9}})\.partial")
_BEAT = 5.0  # seconds between two signs of life of a process that makes an entry
_DEAD = 120.0  # seconds without any, after which another host takes the work over
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def folder(path: str | None) -> Path:
    """Chooses the cache's folder: `path`, else $KD_JAX_CACHE, else ~/.cache/kd_jax."""
    return Path(path or os.environ.get("KD_JAX_CACHE") or "~/.cache/kd_jax").expanduser()


def key(*parts: object) -> str:
    """Hashes the texts of `parts` into the name of the cache entry that is made from them."""
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        found.update(f"{part}\0".encode())
    return found.hexdigest()


def once(entry: Path, write: Callable[[Path], None], setting: str) -> bool:
    """Makes a cache entry unless an undamaged one exists: `write` puts files into an empty folder.

    Processes that ask for the same entry wait for the first, on all hosts that share the folder;
    if that one dies, the next begins anew. Returns whether the entry existed. Raises UserError
    where the folder cannot be written, or the disk is full; it names `setting`.
    """
    if whole(entry):  # no lock, since a complete cache may be read-only
        touch(entry)
        return True
    with _writing(entry.parent, setting), _claimed(entry):
        if whole(entry):
            return True
        with _locked(entry.parent):
            _clear(entry)
            _sweep(entry.parent)
        unfinished = _unfinished(entry)
        unfinished.mkdir()
        try:
            write(unfinished)
            _seal(unfinished)
            try:
                unfinished.rename(entry)
            except OSError:  # another host was first, which had thought this process dead
                if not whole(entry):
                    raise
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return False


def whole(entry: Path, names: Collection[str] = ()) -> bool:
    """Tells whether a cache entry exists with undamaged files (only those of `names`, if given).

    Reads all of their bytes. A damaged entry is logged and removed.
    """
    damaged = _damaged(entry, names)
    if damaged is None or not (entry / MARK).exists():
        return damaged is None
    log.warning("%s is damaged: what it held is computed again", damaged)
    with contextlib.suppress(OSError), _locked(entry.parent):
        if _damaged(entry, names):  # and nobody has just made it again
            _clear(entry)
    return False


def remove(entry: Path, setting: str) -> None:
    """Removes an entry, if it is there. Raises UserError as `once`."""
    with _writing(entry.parent, setting), _locked(entry.parent):
        _clear(entry)


def entries(root: Path, pattern: str = "*") -> list[Path]:
    """Lists the cache entries in a folder, sorted by name."""
    found = sorted(mark.parent for mark in root.glob(f"{pattern}/{MARK}"))
    return [e for e in found if not e.is_symlink() and not e.name.endswith(".partial")]


def touch(entry: Path) -> None:
    """Marks a cache entry as just used, so that others are removed first when room is needed."""
    with contextlib.suppress(OSError):
        os.utime(entry)


def make_room(
    root: Path, size: int, max_bytes: float, kept: Collection[Path], setting: str
) -> float:
    """Removes the least recently used entries of `root`, but none of `kept`, until `size` more
    bytes fit into `max_bytes`.

    Returns the bytes of `kept` plus `size`; if these alone exceed `max_bytes`, nothing is removed.
    Raises UserError as `once`.
    """
    with _writing(root, setting), _locked(root):
        used = {entry: _size(entry) for entry in entries(root)}
        wanted = size + sum(used.pop(entry, 0) for entry in kept)
        for oldest in sorted(used, key=lambda entry: entry.stat().st_mtime):
            if not wanted <= max_bytes < wanted + sum(used.values()):
                break
            log.info("%s is removed, to make room within cache.max_gb", oldest)
            _clear(oldest)
            del used[oldest]
    return wanted


def check_ids(ids: np.ndarray, vocab_size: int, entry: Path) -> None:
    """Raises UserError where a cache entry has token ids outside the vocabulary."""
    if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
        raise UserError(
            f"{entry} holds token ids from {ids.min()} to {ids.max()}, beyond a vocabulary of "
            f"{vocab_size}; remove it, and it is made again"
        )


@contextlib.contextmanager
def _claimed(entry: Path) -> Iterator[None]:
    """Runs the block in one process at a time of all that share the folder.

    A file that only one of them can create names it; while the block runs, its time of change is
    renewed. Where the file stays as it is, or its process is gone from this host, the next process
    takes its place. Should two ever run together, both make the same entry, and one is kept.
    """
    claim = entry.with_name(f"{entry.name}.claim")
    own = f"process {os.getpid()} on {_HOST}, {time.time_ns()}"
    while not _create(claim, own):
        _wait(claim, entry)
    done = threading.Event()

    def beat() -> None:
        while not done.wait(_BEAT):
            touch(claim)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        _release(claim, own)


def _create(claim: Path, text: str) -> bool:
    try:
        number = os.open(claim, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except FileExistsError:
        return False
    with open(number, "w") as file:
        file.write(text)
    return True


def _wait(claim: Path, entry: Path) -> None:
    """Waits until a claim is gone, and removes it where its process is."""
    if (first := _sign(claim)) is None:
        return
    seen = first
    began = changed = time.monotonic()
    told, pause = began + 1, 0.02
    while (sign := _sign(claim)) is not None and sign[0] == first[0]:
        now = time.monotonic()
        seen, changed = sign, (changed if sign == seen else now)
        if _gone(sign[0]) or now - changed > _DEAD:
            log.warning("%s was being made by %s, which is gone: begun anew", entry, sign[0])
            _release(claim, sign[0])
            return
        if now > told:
            log.info("%s is being made by %s: waiting for it", entry, sign[0])
            told = now + 60
        time.sleep(pause)
        pause = min(2 * pause, 1.0)


def _sign(claim: Path) -> tuple[str, int] | None:
    """Reads a claim's text and time of change; None if it is gone. Opens the file, since network
    file systems keep times for a while otherwise."""
    try:
        with open(os.open(claim, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)) as file:
            return file.read(), os.fstat(file.fileno()).st_mtime_ns
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESTALE):
            return None
        raise


def _gone(text: str) -> bool:
    """Tells whether a claim is of a process of this host that has ended."""
    made = re.fullmatch(rf"process (\d{{1,9}}) on {re.escape(_HOST)}, \d+", text)
    return made is not None and not _alive(int(made[1]))


def _release(claim: Path, text: str) -> None:
    """Deletes a claim file, unless another process has replaced it: its text is then another."""
    with contextlib.suppress(OSError):
        if (sign := _sign(claim)) and sign[0] == text:
            claim.unlink()


def _damaged(entry: Path, names: Collection[str]) -> Path | None:
    """Finds the first file of a cache entry that differs from what was written."""
    try:
        digests = storage.read_json(entry / MARK)
    except (UserError, FileNotFoundError, NotADirectoryError):
        return entry / MARK
    if not isinstance(digests, dict) or not digests:
        return entry / MARK
    for name in names or digests:
        try:
            same = storage.digest(entry / name) == digests.get(name)
        except PermissionError:
            raise
        except (OSError, ValueError):
            same = False
        if not same:
            return entry / name
    return None


def _seal(folder: Path) -> None:
    """Flushes a folder's files to disk, and records their digests."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for file in files:
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    digests = {file.relative_to(folder).as_posix(): storage.digest(file) for file in files}
    storage.write_json(folder / MARK, digests)


def _clear(entry: Path) -> None:
    """Removes a cache entry; a folder without the cache's mark is only renamed, for it may be
    somebody else's."""
    if (entry / MARK).exists():
        doomed = _unfinished(entry.with_name(f"{entry.name}.gone"))
        entry.rename(doomed)  # in one go: a kill leaves no half of an entry
        shutil.rmtree(doomed, ignore_errors=True)
    elif os.path.lexists(entry):
        aside = entry.with_name(f"{entry.name}.{time.time_ns()}.aside")
        log.warning("%s has no %s and is not used: it is renamed to %s", entry, MARK, aside.name)
        entry.rename(aside)


def _unfinished(entry: Path) -> Path:
    """Names the folder in which this process makes or removes a cache entry, and empties it: a
    killed process with the same number may have left files there."""
    path = entry.with_name(f"{entry.name}.{_HOST}.{os.getpid()}.partial")
    shutil.rmtree(path, ignore_errors=True)
    return path


def _sweep(root: Path) -> None:
    """Removes unfinished entries that killed processes of this machine have left behind."""
    for path in root.glob("*.partial"):
        made = _PARTIAL.fullmatch(path.name)
        if made and not _alive(int(made[1])):
            log.info("%s is removed: its process was killed", path)
            shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        pass
    return True


def _size(entry: Path) -> int:
    return sum(path.stat().st_size for path in entry.rglob("*") if path.is_file())


def _locked(root: Path) -> contextlib.AbstractContextManager[None]:
    return storage.lock(root / ".lock")


@contextlib.contextmanager
def _writing(root: Path, setting: str) -> Iterator[None]:
    """Makes a folder; inside the block, errors of writing become a UserError with advice."""

    def plain(error: OSError) -> UserError:
        return UserError(
            f"cannot write {error.filename or root}: {error.strerror or error}; set {setting} or "
            f"KD_JAX_CACHE to another folder"
        )

    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise plain(error) from None
    try:
        yield
    except OSError as error:
        # Others are of reading what goes into the cache. NumPy has no number for a full disk.
        ours = Path(str(error.filename)).is_relative_to(root) or error.errno in FULL
        if ours or (type(error) is OSError and error.errno is None):
            raise plain(error) from None
        raise
