"""Starts `python -m kd_jax.main`, or a script, by forking a process that has done the imports: they
take seconds, and the tests that kill and restart runs need many starts.

    process = forked.start(["--config=..."], folder)
    process.wait() == 0 and process.output()
"""

import atexit
import dataclasses
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests import FAST

ROOT = Path(__file__).resolve().parents[1]


@dataclasses.dataclass
class Process:
    """A running command, with what subprocess.Popen has."""

    pid: int
    out: Path
    errors: Path
    returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = _ask({"poll": self.pid})
        return self.returncode

    def wait(self, timeout: float = 120.0) -> int:
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                self.send_signal(signal.SIGKILL)
                raise TimeoutError(f"{self.output()}\n{self.error()}")
            time.sleep(0.01)
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def output(self) -> str:
        return self.out.read_text()

    def error(self) -> str:
        return self.errors.read_text()


def start(arguments: list[str], folder: Path, script: str = "", **environment: str) -> Process:
    """Runs kd_jax.main, or `script`, in `folder`, on one CPU device unless XLA_FLAGS say otherwise;
    its output goes to a new file there. A run's pictures are empty."""
    number = len(list(folder.glob("*.out")))
    out, errors = folder / f"{number}.out", folder / f"{number}.err"
    out.touch()
    request = dict(arguments=arguments, folder=str(folder), environment=environment, script=script)
    pid = _ask(request | dict(out=str(out), errors=str(errors)))
    return Process(pid, out, errors)


def run(command: list[str], env: dict[str, str] | None = None, **_) -> subprocess.CompletedProcess:
    """As subprocess.run, for [python, script, *arguments] whose output is captured as text."""
    with tempfile.TemporaryDirectory() as folder:
        process = start([*map(str, command[2:])], Path(folder), str(command[1]), **env or {})
        status = process.wait()
        return subprocess.CompletedProcess(command, status, process.output(), process.error())


def preload(*modules: str) -> None:
    """Has what is started later find these imported."""
    _ask({"import": modules})


def cluster() -> list[list[str]]:
    """Flags of each of two processes that work together."""
    with socket.create_server(("", 0)) as server:
        at = f"--coordinator=127.0.0.1:{server.getsockname()[1]}"
    return [[at, f"--process_id={i}", "--process_count=2"] for i in range(2)]


def _ask(request: dict):
    server = _server()
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    return json.loads(server.stdout.readline())


@functools.cache
def _server() -> subprocess.Popen:
    kept = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
    compiled = tempfile.TemporaryDirectory(prefix="kd_jax_tests_")
    own = dict(
        PYTHONPATH=str(ROOT),
        JAX_COMPILATION_CACHE_DIR=compiled.name,
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
        JAX_DISABLE_MOST_OPTIMIZATIONS="1",  # tiny programs: compiling them takes longest
        KD_JAX_CACHE=compiled.name,
        XLA_FLAGS=FAST,
    )
    server = subprocess.Popen(
        [sys.executable, __file__],
        env=kept | own,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(compiled.cleanup)
    atexit.register(server.stdout.close)
    atexit.register(server.wait)
    atexit.register(server.stdin.close)
    return server


def _serve() -> str:
    """Answers a line of JSON by another, until the input ends; returns the script to run in each
    new process."""
    answers = os.fdopen(os.dup(1), "w")
    while line := sys.stdin.readline():
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        elif "import" in request:
            answer = [importlib.import_module(name).__name__ for name in request["import"]]
            gc.freeze()
        else:
            answer = os.fork()
            if answer == 0:
                _become(request)
                return request["script"]
        print(json.dumps(answer), file=answers, flush=True)
    sys.exit()


def _become(request: dict) -> None:
    os.chdir(request["folder"])
    script = request["script"]
    sys.path.insert(0, os.path.dirname(script) or request["folder"])  # as python does
    os.environ.update(request["environment"])
    if platforms := request["environment"].get("JAX_PLATFORMS"):
        jax.config.update("jax_platforms", platforms)
    for number, path in ((0, os.devnull), (1, request["out"]), (2, request["errors"])):
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    sys.argv = [script or "kd_jax.main", *request["arguments"]]


if __name__ == "__main__":
    # What a run imports; nothing of it touches a device.
    import jax
    import matplotlib.backends.backend_agg  # noqa: F401
    import tensorboardX  # noqa: F401
    import transformers.models.bert.modeling_bert  # noqa: F401

    import kd_jax.data.files
    import kd_jax.main
    import kd_jax.recipes.distil
    import kd_jax.tasks.mlm  # noqa: F401
    from kd_jax import plugins
    from kd_jax.report import plots

    for imported in (("models", "FAMILY"), ("stages", "make")):
        plugins.names(*imported)
    plots.sheet = lambda *given, **more: plots.Figure(figsize=(1, 1))
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)  # as in conftest.py
    if script := _serve():
        runpy.run_path(script, run_name="__main__")
    else:
        kd_jax.main.main()
