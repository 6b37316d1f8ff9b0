"""What the command lines share: flags without tracebacks, one-line errors, JAX start-up."""

import argparse
import contextlib
import difflib
import errno
import glob
import io
import logging
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import absl.logging
import jax
import rich.console
from absl import flags
from ml_collections import ConfigDict

from kd_jax import experiments, keys
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


def parse_flags(usage: str, argv: list[str]) -> list[str]:
    """Parses absl's flags, of which --config has to be one, and shows `usage` where it is not; a
    config file or key that is wrong is one line, not a traceback."""
    names = {each.lstrip("-").partition("=")[0] for each in argv[1:] if each.startswith("-")}
    if not names & {"config", "help", "helpfull", "helpshort", "helpxml"}:
        print(usage, file=sys.stderr)
        paths = [each for each in argv[1:] if re.fullmatch(r"[^-].*\.py(:\S*)?", each)]
        _fail(
            "--config=FILE is missing" + (f"; did you mean --config={paths[0]}?" if paths else "")
        )
    whole = sys.argv
    try:
        argv, values = _taken(_with_paths(argv))
        sys.argv = argv  # where ml_collections looks for keys of the config
        rest = flags.FLAGS(argv)
        keys.put(flags.FLAGS.config, values)
        _ = flags.FLAGS.config.recipe  # tells here and not later that the file could not be read
    except UserError as error:
        _fail(str(error))
    except Exception as error:  # whatever the config file does
        _fail(_of_keys(argv) or _of_flags(error))
    finally:
        sys.argv = whole
    if rest[1:]:
        meant = rest[1].startswith(("config", "workdir"))
        hint = f"did you mean --{rest[1]}?" if meant else "flags begin with --"
        _fail(f"{rest[1]!r} is no flag; {hint}")
    return rest


def _config(argv: list[str]) -> ConfigDict | None:
    """The config that the arguments name, as its file makes it; None where that is wrong."""
    pairs = zip(argv, [*argv[1:], ""], strict=True)
    named = [re.fullmatch("--?config(?:=(.*))?", each) and (each, after) for each, after in pairs]
    file = next((each.partition("=")[2] or after for each, after in filter(None, named)), "")
    try:
        return flags.FLAGS["config"].parser.parse(file)
    except Exception:  # whatever the config file does
        return None


def _taken(argv: list[str]) -> tuple[list[str], dict[str, Any]]:
    """The arguments without those that set keys which the config file lacks, and these."""
    if not any(re.match(r"--?config\.", each) for each in argv) or (found := _config(argv)) is None:
        return argv, {}
    return keys.taken(found, argv)


def _of_keys(argv: list[str]) -> str:
    """Names the first flag whose key the config file lacks, and keys that may be meant; or ""."""
    if (config := _config(argv)) is None:
        return ""
    there = list(_dotted(config.to_dict()))
    given = [re.match(r"--?(?:no)?(config\.)?([a-z][^=[]*)", each) for each in argv[1:]]
    known = [*flags.FLAGS, *(f"no{each}" for each in flags.FLAGS)]
    for each in filter(None, given):
        key = each[2]
        if key in (there if each[1] else known):
            continue
        *sections, name = key.split(".")
        ends = {key.rpartition(".")[2]: key for key in reversed(there)}
        close = [key for key in there if key.rpartition(".")[2] == name]
        close = close or [ends[end] for end in difflib.get_close_matches(name, ends, n=2)]
        meant = " or ".join(f"--config.{key}" for key in close[:3])
        hint = f" (did you mean {meant}?)" if close else ""
        if not each[1]:
            return f"unknown flag --{key}{hint}" if hint else ""
        while sections and ".".join(sections) not in there:
            sections.pop()
        where = "".join(f"{section}." for section in sections)
        have = [key.removeprefix(where) for key in there if key.startswith(where)]
        have = dict.fromkeys([*(key for key in have if "." not in key), *keys.of_term(sections)])
        have = ", ".join(have) or "no keys"
        return f"config: no key {key!r}{hint}; {f'config.{where}'.rstrip('.')} has {have}"
    return ""


def _dotted(section: Mapping, path: str = "") -> Iterator[str]:
    """Names every section and key of a config: optim, optim.learning_rate."""
    for key, value in section.items():
        yield f"{path}{key}"
        if isinstance(value, dict):
            yield from _dotted(value, f"{path}{key}.")


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
    if "as a ConfigDict" in reason:
        reason = f"{reason.partition(': ')[0]}: a section; set its keys, one by one"
    if places:
        return f"{places[-1]}: {reason}"
    return reason if isinstance(error, flags.Error) else f"config: {reason}"


def positive(text: str) -> int:
    """Reads a flag's whole number above 0."""
    number = int(text) if re.fullmatch(r"\d+", text) else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return number


def check_given(args: argparse.Namespace) -> None:
    """Raises UserError for a flag that is empty, as it is where a shell variable is not set."""
    empty = [name for name, value in vars(args).items() if value == ""]
    if empty:
        raise UserError(f"--{empty[0]} is empty; give it a value, or leave it out")


def check_file(flag: str, path: str | None) -> None:
    """Raises UserError where a file that is written in the end could not be."""
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
    """Raises UserError where a folder that is made in the end could not be."""
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
    """What the user can put right ends the program with one line and status 1.

    `names`: what recipes call a setting, as a regex, and what the command line calls it.
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
