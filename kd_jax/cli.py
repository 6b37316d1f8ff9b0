"""What the command lines share: flags without tracebacks, one-line errors, JAX start-up."""

import contextlib
import errno
import glob
import io
import logging
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator

import absl.logging
import jax
import rich.console
from absl import flags

from kd_jax import experiments
from kd_jax.data import cache
from kd_jax.errors import UserError
from kd_jax.train import progress

log = logging.getLogger(__name__)

# transformers complains as it is imported where PyTorch is missing, which kd_jax needs for nothing.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

CPU_FLAGS = "--xla_cpu_enable_fast_math=true"  # nothing to other platforms

_ACCELERATORS = ("/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia*", "/dev/kfd", "/dev/dxg")
_LOST = re.compile("gloo|nccl|unavailable|deadline|heartbeat|coordination", re.IGNORECASE)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


def parse_flags(argv: list[str]) -> list[str]:
    """absl's flag parsing; a config file or key that is wrong is one line, not a traceback."""
    try:
        rest = flags.FLAGS(_with_paths(argv))
        _ = flags.FLAGS.config.recipe  # tells here and not later that the file could not be read
        return rest
    except UserError as error:
        _fail(str(error))
    except Exception as error:  # whatever the config file does
        _fail(_of_flags(error))


def _with_paths(argv: list[str]) -> list[str]:
    """The arguments, with the path of the file where --config names an experiment of kd_jax."""
    found = list(argv)
    for i, argument in enumerate(argv):
        name, equals, value = argument.partition("=")
        if name in ("--config", "-config"):
            if equals:
                found[i] = f"{name}={experiments.path(value)}"
            elif i + 1 < len(argv):
                found[i + 1] = experiments.path(argv[i + 1])
    return found


def _of_flags(error: Exception) -> str:
    """What absl, ml_collections or the config file itself complains of, and where, as one line."""
    # ml_collections puts tracebacks of config files into its messages.
    frames = re.findall(r'File "(.+?)", line (\d+)', "".join(traceback.format_exception(error)))
    others = ("<", __file__, sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"))
    places = [f"{file}:{line}" for file, line in frames if not file.startswith(others)]
    reason = str(error).strip().splitlines()[-1].strip()
    if isinstance(error, AttributeError | KeyError):
        while isinstance(error, Exception):  # ml_collections wraps one into the other
            error = error.args[0]
        reason = f"no key {' '.join(error.split())}"
    if places:
        return f"{places[-1]}: {reason}"
    return reason if isinstance(error, flags.Error) else f"config: {reason}"


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """What the user can put right ends the program with one line and status 1."""
    try:
        yield
    except UserError as error:
        log.debug("details", exc_info=error)
        _fail(str(error))
    except KeyboardInterrupt:
        _fail("interrupted; the same command continues from the last checkpoint", status=130)
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        if number in _FULL or "No space left on device" in str(error):
            _fail(f"cannot write a file: {_line(error)}; make room and run the same command again")
        if number in _FORBIDDEN:
            _fail(f"{_line(error)}; set its permissions, or give another folder")
        if not jax.distributed.is_initialized():
            raise
        # Leaving as usual would wait for the others, who may wait for this process.
        if not _LOST.search(str(error)):
            traceback.print_exc()
        _fail(
            f"process {jax.process_index()} of {jax.process_count()} cannot go on: {_line(error)}. "
            f"The same command continues from the last checkpoint"
        )


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


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
    """Prints to what stderr is when a line comes: above the bar while there is one."""

    stream = property(lambda self: sys.stderr, lambda self, _: None)

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if not self.stream.isatty():
            return text
        return progress.wrapped(text, rich.console.Console(stderr=True).width)


def start_jax() -> None:
    """Log, platform and compilation cache; before anything touches a device."""
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
    sys.unraisablehook = _but_late_files(sys.unraisablehook)
    if sys.platform == "linux" and not any(glob.glob(files) for files in _ACCELERATORS):
        if not jax.config.jax_platforms:  # libtpu, tried without a TPU, complains at length
            jax.config.update("jax_platforms", "cpu")
    # Lets sums over the vocabulary be vectorised (three times as fast); NaN and infinity stay.
    # What the user sets comes later, and wins.
    os.environ["XLA_FLAGS"] = f"{CPU_FLAGS} {os.environ.get('XLA_FLAGS', '')}"
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache.folder(None) / "xla"))
