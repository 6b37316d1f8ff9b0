import contextlib
import errno
import io
import logging
import subprocess
import sys

import absl.logging
import jax
import pytest

from kd_jax import cli
from kd_jax.errors import UserError
from tests import forked


@pytest.fixture
def ended(capsys):
    """Raises an error in the program and gives back its status and its last words."""

    def by(error):
        with pytest.raises(SystemExit) as left, cli.plain_errors():
            raise error
        found = capsys.readouterr()
        assert found.out == ""
        return left.value.code, found.err

    return by


def test_what_users_can_put_right_is_one_line(ended):
    assert ended(UserError("no such file")) == (1, "error: no such file\n")


def test_an_interruption_tells_how_to_go_on(ended):
    status, line = ended(KeyboardInterrupt())
    assert status == 130 and line.endswith("the same command continues from the last checkpoint\n")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "runs/a/metrics.csv"),
            "error: cannot write a file: [Errno 28] No space left on device: 'runs/a/metrics.csv'; "
            "make room and run the same command again\n",
        ),
        (
            Exception("No space left on device (os error 28)"),  # Rust's, of the tokenizers
            "error: cannot write a file: No space left on device (os error 28); make room and run "
            "the same command again\n",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "results.json"),
            "error: [Errno 13] Permission denied: 'results.json'; set its permissions, or give "
            "another folder\n",
        ),
    ],
)
def test_a_disk_that_refuses_is_one_line(ended, error, line):
    assert ended(error) == (1, line)


@pytest.mark.parametrize("error", [ValueError("shapes"), OSError(errno.EIO, "I/O error")])
def test_mistakes_of_ours_keep_their_traceback(error):
    with pytest.raises(type(error)), cli.plain_errors():
        raise error


@pytest.fixture
def several(monkeypatch):
    """As in a run of several processes, where leaving as usual would wait for the others."""
    left = []
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(cli.os, "_exit", lambda status: left.append(status))
    return left


def test_the_loss_of_another_process_is_one_line(several, capsys):
    with cli.plain_errors():
        raise ValueError("UNKNOWN: Gloo all-reduce failed:\n Connection closed by peer")
    assert several == [1]
    assert capsys.readouterr().err == (
        "error: process 0 of 1 cannot go on: UNKNOWN: Gloo all-reduce failed: Connection closed by "
        "peer. The same command continues from the last checkpoint\n"
    )


def test_a_mistake_of_ours_does_not_hold_up_the_others(several, capsys):
    with cli.plain_errors():
        raise ValueError("shapes differ")
    assert several == [1]
    assert "Traceback" in capsys.readouterr().err


@pytest.fixture
def started(monkeypatch):
    """start_jax, with everything that it changes put back."""
    own = logging.getLogger("kd_jax")
    before = own.handlers, own.propagate, own.level, absl.logging.get_verbosity()
    cache, others = jax.config.jax_compilation_cache_dir, logging.getLogger().level
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: seen.append(unraisable))
    monkeypatch.setenv("XLA_FLAGS", cli.os.environ["XLA_FLAGS"])
    monkeypatch.setenv("KD_JAX_KEEP_MEMORY", "0")  # it would hold for all later tests
    seen = []
    cli.start_jax()
    yield seen
    own.handlers, own.propagate = before[:2]
    own.setLevel(before[2])
    logging.getLogger().setLevel(others)
    absl.logging.set_verbosity(before[3])
    jax.config.update("jax_compilation_cache_dir", cache)


def test_the_log_is_plain_lines_of_our_own(started, capsys):
    logging.getLogger("kd_jax.data.blocks").info("tokens: %d", 3)
    logging.getLogger("kd_jax.data.blocks").debug("too much")
    absl.logging.info("Orbax does this and that")
    absl.logging.error("Orbax says what it raises as well")
    assert capsys.readouterr().err == "tokens: 3\n"


def test_the_log_goes_above_the_bar(started, capsys):
    with contextlib.redirect_stderr(io.StringIO()) as stderr:  # as rich does while a bar is there
        logging.getLogger("kd_jax").info("a line")
    assert (stderr.getvalue(), capsys.readouterr().err) == ("a line\n", "")


def test_on_a_terminal_the_log_is_wrapped_between_words(started, monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        monkeypatch.setattr(stderr, "isatty", lambda: True)
        logging.getLogger("kd_jax").info("tokens of a file: 214042 in 0.2 s")
    assert stderr.getvalue() == "tokens of a file: 214042\n  in 0.2 s\n"


class Glibc:
    def __init__(self):
        self.asked = []

    def gnu_get_libc_version(self):
        return b"2.36"

    def mallopt(self, parameter, value):
        self.asked.append((parameter, value))
        return 1


def test_glibc_keeps_what_a_step_frees(monkeypatch, started):
    """M_MMAP_MAX 0, M_TRIM_THRESHOLD -1 and M_ARENA_MAX 1, by their numbers in malloc.h."""
    libc = Glibc()
    monkeypatch.setattr(cli.ctypes, "CDLL", lambda name: libc)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("KD_JAX_KEEP_MEMORY", "1")
    cli.start_jax()  # on a CPU, as all tests
    assert libc.asked == [(-4, 0), (-1, -1), (-8, 1)]


@pytest.mark.parametrize("case", ["switched off", "musl", "macOS", "accelerator"])
def test_memory_is_given_back_elsewhere(case, monkeypatch, started):
    libc = Glibc()
    monkeypatch.setattr(cli.ctypes, "CDLL", lambda name: object() if case == "musl" else libc)
    monkeypatch.setattr(sys, "platform", "darwin" if case == "macOS" else "linux")
    monkeypatch.setenv("KD_JAX_KEEP_MEMORY", "0" if case == "switched off" else "1")
    if case == "accelerator":
        monkeypatch.setattr(cli.jax, "config", AsOnGpu())
    else:
        assert not cli.keep_memory()
    cli.start_jax()
    assert libc.asked == []


class AsOnGpu:
    jax_platforms = "cuda,cpu"

    def update(self, name, value):
        pass


def test_late_writes_are_not_told(started):
    class Unraisable:
        def __init__(self, text):
            self.exc_value = RuntimeError(text)

    for text in ("Event loop is closed", "Encountered error while reading array", "anything else"):
        sys.unraisablehook(Unraisable(text))
    assert [str(each.exc_value) for each in started] == ["anything else"]


def test_starts_without_noise():
    """libtpu, which the tests install, complains where there is no TPU, and transformers where
    there is no PyTorch, unless they are told."""
    if any(cli.glob.glob(files) for files in cli._ACCELERATORS):
        pytest.skip("there may be an accelerator")
    program = (
        "import importlib.util as u; find = u.find_spec; "
        "u.find_spec = lambda name, *others: name != 'torch' and find(name, *others) or None; "
        "from kd_jax import cli; cli.start_jax(); import jax, transformers; "
        "print('−', jax.default_backend(), transformers.is_torch_available())"
    )
    kept = {k: v for k, v in cli.os.environ.items() if k not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=forked.ROOT,
        env=kept | {"PYTHONIOENCODING": "latin-1"},  # which has no such minus
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.stdout, done.stderr) == ("? cpu False\n", "")
