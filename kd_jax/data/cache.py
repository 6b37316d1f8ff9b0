"""Files that are made once from data, and found later by a hash of what they were made from."""

import contextlib
import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from kd_jax.errors import UserError

_NOT_WRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM)


def folder(path: str | None) -> Path:
    """`path`, else $KD_JAX_CACHE, else ~/.cache/kd_jax."""
    return Path(path or os.environ.get("KD_JAX_CACHE") or "~/.cache/kd_jax").expanduser()


def once(file: Path, write: Callable[[Path], None]) -> bool:
    """Whether `file` was there; otherwise `write` makes it, under another name until it is whole.

    Processes of one machine that ask for the same file wait for the first. Raises UserError where
    the folder cannot be written, or is full.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with lock(file.with_suffix(".lock")):
            if file.exists():
                return True
            unfinished = file.with_name(f"{file.name}.{os.getpid()}.tmp")
            try:
                write(unfinished)
                os.replace(unfinished, file)
            finally:
                unfinished.unlink(missing_ok=True)
            return False
    except OSError as error:
        if error.errno not in _NOT_WRITABLE:
            raise
        raise UserError(
            f"cannot write tokens to {file.parent}: {error.strerror}; set config.data.cache_dir or "
            f"KD_JAX_CACHE to another folder"
        ) from None


@contextlib.contextmanager
def lock(file: Path) -> Iterator[None]:
    """Processes of one machine that lock the same file come one after the other."""
    with file.open("w") as stream:
        # Some network filesystems have no locks: then two processes may do the same work, and
        # the last one's file stays.
        with contextlib.suppress(OSError):
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield
