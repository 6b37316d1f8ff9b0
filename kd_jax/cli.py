"""What the command lines share: flags without tracebacks, one-line errors, JAX start-up."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
from absl import flags, logging

from kd_jax.errors import UserError
from kd_jax.train import distributed


def parse_flags(argv: list[str]) -> list[str]:
    """absl's flag parsing; a config file or key that is wrong is one line, not a traceback."""
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        _fail(str(error))
    except FileNotFoundError as error:
        _fail(f"no config file {error.filename}")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        _fail(f"config: {' '.join(str(error.args[0] if error.args else error).split())}")


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """A UserError ends the program with one line and status 1."""
    try:
        yield
    except UserError as error:
        logging.debug("details", exc_info=error)
        _fail(str(error))
    except KeyboardInterrupt:
        _fail("interrupted; the same command continues from the last checkpoint", status=130)


def _fail(message: str, status: int = 1) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)
    # Threads of data loaders and of distributed runtimes must not hold up the exit.
    sys.stdout.flush()
    os._exit(status) if jax.distributed.is_initialized() else sys.exit(status)


def start_jax() -> None:
    """Log level, compilation cache and jax.distributed; before anything touches a device."""
    logging.set_verbosity(logging.INFO)
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = Path(os.environ.get("KD_JAX_CACHE", Path.home() / ".cache" / "kd_jax"))
        jax.config.update("jax_compilation_cache_dir", str(cache / "xla"))
    distributed.initialize()
