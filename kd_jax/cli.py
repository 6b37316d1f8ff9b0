"""Checks paths, prints errors on one line and starts JAX, for all commands."""

import contextlib
import ctypes
import errno
import glob
import io
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import absl.logging
import jax
import rich.console

from kd_jax.data import cache
from kd_jax.errors import UserError, line
from kd_jax.train import progress

log = logging.getLogger(__name__)

# transformers complains as it is imported where PyTorch is missing, which kd_jax needs for nothing.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

CPU_FLAGS = "--xla_cpu_enable_fast_math=true"  # nothing to other platforms
KEEP_MEMORY = "KD_JAX_KEEP_MEMORY"  # 0: freed memory goes back to the system
# M_MMAP_MAX, M_TRIM_THRESHOLD, M_ARENA_MAX of glibc's malloc.h: nothing is mapped by itself, the
# heap is never trimmed, and all threads share it.
_MALLOC = ((-4, 0), (-1, -1), (-8, 1))

_ACCELERATORS = ("/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia*", "/dev/kfd", "/dev/dxg")
_LOST = re.compile("gloo|nccl|unavailable|deadline|heartbeat|coordination", re.IGNORECASE)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


def check_file(flag: str, path: str | None) -> None:
    """Raises UserError if the file of an output flag cannot be written."""
    if not path or "://" in path:
        return
    folder = Path(path).absolute().parent
    if Path(path).is_dir():
        raise UserError(f"{flag}={path} is a folder; give a file")
    if not folder.is_dir():
        raise UserError(f"{flag}={path}: there is no folder {folder}; make it, or give another")
    if not os.access(path if Path(path).exists() else folder, os.W_OK):
        raise UserError(f"{flag}={path}: it may not be written; give another file")


def check_folder(flag: str, path: str | None) -> None:
    """Raises UserError if the folder of an output flag cannot be made, or written to."""
    if not path or "://" in path:
        return
    whole = Path(path).absolute()
    there = next(each for each in (whole, *whole.parents) if each.exists())
    if not there.is_dir():
        raise UserError(f"{flag}={path}: {there} is a file; give another folder")
    if not os.access(there, os.W_OK):
        raise UserError(f"{flag}={path}: nothing may be written to {there}; give another folder")


@contextlib.contextmanager
def plain_errors(names: Mapping[str, str] | None = None) -> Iterator[None]:
    """Ends the program with one line and status 1 at an error that the user can fix.

    `names`: maps names of settings in recipes (regex) to their names on the command line.
    """
    try:
        yield
    except UserError as error:
        log.debug("details", exc_info=error)
        message = str(error)
        for called, flag in (names or {}).items():
            message = re.sub(rf"(?<![\w.-])({called})(?!\w)", flag, message)
        _fail(message)
    except KeyboardInterrupt:
        _fail("interrupted; the same command continues from the last checkpoint", status=130)
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        if number in cache.FULL or "No space left on device" in str(error):
            _fail(f"cannot write a file: {line(error)}; make room and run the same command again")
        if number in _FORBIDDEN:
            _fail(f"{line(error)}; set its permissions, or give another folder")
        if not jax.distributed.is_initialized():
            raise
        # Leaving as usual would wait for the others, who may wait for this process.
        if not _LOST.search(str(error)):
            traceback.print_exc()
        _fail(
            f"process {jax.process_index()} of {jax.process_count()} cannot go on: {line(error)}. "
            f"The same command continues from the last checkpoint"
        )


def _fail(message: str, status: int = 1) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)
    # Threads of data loaders and of distributed runtimes must not hold up the exit.
    sys.stdout.flush()
    os._exit(status) if jax.distributed.is_initialized() else sys.exit(status)


def _but_late_files(hook: Callable) -> Callable:
    said = re.compile("Event loop is closed|Encountered error while reading array")

    def quieter(unraisable):
        if not said.match(str(unraisable.exc_value)):
            hook(unraisable)

    return quieter


class _Log(logging.StreamHandler):
    """A log handler that prints to the current sys.stderr, above the progress bar if any."""

    stream = property(lambda self: sys.stderr, lambda self, _: None)

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if not self.stream.isatty():
            return text
        return progress.wrapped(text, rich.console.Console(stderr=True).width)


def keep_memory() -> bool:
    """Has glibc keep the memory that a step frees for the next one, unless $KD_JAX_KEEP_MEMORY is
    0; tells whether it does.

    XLA's CPU backend allocates its buffers anew at every step. They are so large that glibc maps
    each by itself and unmaps it afterwards, and every page is faulted in again: a quarter of a
    step's time. Other C libraries are left alone.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if os.environ.get(KEEP_MEMORY) == "0" or not hasattr(libc, "gnu_get_libc_version"):
        return False
    return all([libc.mallopt(*setting) == 1 for setting in _MALLOC])


def start_jax() -> None:
    """Sets up logging, platform and compilation cache; call it before anything uses a device."""
    for stream in (sys.stdout, sys.stderr):  # a terminal may lack a sign that a table has
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    own = logging.getLogger("kd_jax")
    own.handlers, own.propagate = [_Log()], False
    own.setLevel(logging.INFO)
    # Orbax tells of its every step; what it logs as an error it raises as well. After an error,
    # writes that end later find its event loop closed, and reads that fail too are heard by nobody,
    # which is printed one by one.
    absl.logging.set_verbosity(absl.logging.FATAL)
    logging.getLogger().setLevel(logging.CRITICAL)  # of other libraries
    sys.unraisablehook = _but_late_files(sys.unraisablehook)
    if sys.platform == "linux" and not any(glob.glob(files) for files in _ACCELERATORS):
        if not jax.config.jax_platforms:  # libtpu, tried without a TPU, complains at length
            jax.config.update("jax_platforms", "cpu")
    if (jax.config.jax_platforms or "").split(",")[0] == "cpu":
        keep_memory()
    # Lets sums over the vocabulary be vectorised (three times as fast); NaN and infinity stay.
    # What the user sets comes later, and wins.
    os.environ["XLA_FLAGS"] = f"{CPU_FLAGS} {os.environ.get('XLA_FLAGS', '')}"
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache.folder(None) / "xla"))
