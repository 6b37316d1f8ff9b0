import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kd_jax.errors import UserError
from kd_jax.train.distributed import Cluster, detect
from tests import forked

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("distributed_worker.py")
NO_FLAGS = {"coordinator": None, "process_id": None, "process_count": None}
SLURM = {
    "SLURM_JOB_ID": "1000",
    "SLURM_STEP_ID": "2",
    "SLURM_PROCID": "1",
    "SLURM_NTASKS": "2",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "node[017-018]",
}
JOBSET = {
    "JAX_COORDINATOR_ADDRESS": "job-workers-0-0.job:8476",
    "JAX_PROCESS_COUNT": "4",
    "JOB_COMPLETION_INDEX": "3",
}


def test_one_process_by_default():
    assert detect(NO_FLAGS, {}) is None


def test_flags_come_first():
    flags = {"coordinator": "host:1234", "process_id": 1, "process_count": 2}
    assert detect(flags, {**JOBSET, **SLURM}) == Cluster("flags", "host:1234", 1, 2)


def test_environment_of_a_jobset():
    assert detect(NO_FLAGS, JOBSET) == Cluster("environment", "job-workers-0-0.job:8476", 3, 4)
    own = detect(NO_FLAGS, {**JOBSET, "JAX_PROCESS_ID": "2"})
    assert own.process_id == 2


def test_slurm():
    port = 61440 + (31 * 1000 + 2) % 4096
    assert detect(NO_FLAGS, SLURM) == Cluster("SLURM", f"node017:{port}", 1, 2)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("alpha", "alpha"),
        ("alpha,beta", "alpha"),
        ("n[3,7-9],m2", "n3"),
        ("rack1-n[03-04]", "rack1-n03"),
    ],
)
def test_first_node_of_slurm(nodes, first):
    cluster = detect(NO_FLAGS, {**SLURM, "SLURM_STEP_NODELIST": nodes})
    assert cluster.coordinator.split(":")[0] == first


@pytest.mark.parametrize(
    ("changes", "local_devices"),
    [
        ({}, None),  # a task a node: all its GPUs
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, None),
        ({"SLURM_STEP_NUM_NODES": "1"}, 0),  # two tasks on one node: one each
        ({"SLURM_STEP_NUM_NODES": "1", "CUDA_VISIBLE_DEVICES": "0,1"}, 0),
        ({"SLURM_STEP_NUM_NODES": "1", "CUDA_VISIBLE_DEVICES": "1"}, None),  # bound by SLURM
    ],
)
def test_gpus_of_slurm_tasks(changes, local_devices):
    assert detect(NO_FLAGS, {**SLURM, **changes}).local_devices == local_devices


def test_steps_of_a_slurm_job_have_their_own_ports():
    other = detect(NO_FLAGS, {**SLURM, "SLURM_STEP_ID": "3"})
    assert other.coordinator != detect(NO_FLAGS, SLURM).coordinator


def test_batch_script_of_slurm_outside_srun_is_one_process():
    alone = {name: value for name, value in SLURM.items() if name != "SLURM_STEP_NODELIST"}
    assert detect(NO_FLAGS, alone) is None


@pytest.mark.parametrize(
    ("flags", "environ", "message"),
    [
        ({"process_id": 1}, {}, "--process_id given without --coordinator, --process_count"),
        (
            {"coordinator": "host", "process_id": 0, "process_count": 2},
            {},
            "'host' is not HOST:PORT",
        ),
        (
            {"coordinator": "host:1", "process_id": 2, "process_count": 2},
            {},
            "process id 2 of 2 processes; ids go from 0 to 1",
        ),
        ({}, {"JAX_COORDINATOR_ADDRESS": "h:1"}, "JOB_COMPLETION_INDEX should be a number"),
        ({}, {**JOBSET, "JAX_PROCESS_COUNT": "all"}, "JAX_PROCESS_COUNT should be a number"),
        ({}, {**SLURM, "SLURM_NTASKS": ""}, "SLURM_NTASKS should be a number, not ''"),
    ],
)
def test_incomplete_settings(flags, environ, message):
    with pytest.raises(UserError, match=message):
        detect({**NO_FLAGS, **flags}, environ)


def environment() -> dict[str, str]:
    """This one, with one CPU device a process and no cluster."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "JAX_"))}
    kept.pop("XLA_FLAGS", None)
    return {**kept, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}


@pytest.fixture
def start(tmp_path):
    """Starts a process of a distributed run."""
    return lambda *flags: forked.start([*flags], tmp_path, str(WORKER), JAX_PLATFORMS="cpu")


def finish(process: forked.Process) -> tuple[int, str]:
    """Status, and the errors without the log lines of JAX's own libraries."""
    code = process.wait()
    lines = process.error().splitlines()
    own = [line for line in lines if line.startswith(("error", "Traceback"))]
    return code, "\n".join(own)


@pytest.fixture
def port():
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def test_processes_that_do_not_meet(start, port):
    at = f"--coordinator=127.0.0.1:{port}"
    # Each waits for another run's processes: no one listens where the second looks.
    waiting = start(at, "--process_id=0", "--process_count=2", "--start_timeout=1")
    lost = start(
        "--coordinator=nowhere.invalid:1234",
        "--process_id=1",
        "--process_count=2",
        "--start_timeout=1",
    )
    code, error = finish(waiting)
    assert code == 1
    assert error == (
        f"error: process 0 of 2 (flags): after 1 s, some of the 2 processes have not come to "
        f"127.0.0.1:{port}; are they running, and can they reach this machine?"
    )
    code, error = finish(lost)
    assert code == 1
    assert "process 0 cannot be reached at nowhere.invalid:1234 (" in error
    assert error.count("\n") == 0


def test_a_port_in_use(start):
    with socket.create_server(("", 0)) as server:
        at = f"--coordinator=127.0.0.1:{server.getsockname()[1]}"
        code, error = finish(start(at, "--process_id=0", "--process_count=2"))
    assert code == 1
    assert "Address already in use" in error and "choose another port" in error
    assert error.count("\n") == 0


def test_local_processes_script():
    script = ROOT / "launch" / "local_processes.sh"
    found = subprocess.run(
        ["bash", str(script), "2", str(WORKER)],
        env={**environment(), "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert found.returncode == 0, found.stderr
    lines = [line for line in found.stdout.splitlines() if "sum" in line]
    assert sorted(lines) == ["[0] process 0 of 2: sum 3", "[1] process 1 of 2: sum 3"]


def test_local_processes_script_reports_failure():
    script = ROOT / "launch" / "local_processes.sh"
    found = subprocess.run(
        ["bash", str(script), "2", "-c", "import sys; sys.exit(7)"],
        env={**environment(), "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert found.returncode == 7


def test_local_processes_script_passes_sigterm_on(tmp_path):
    leave = f"""
import pathlib, signal, sys, time
def save_and_leave(*_):
    time.sleep(0.2)
    sys.exit(3)
signal.signal(signal.SIGTERM, save_and_leave)
pathlib.Path({str(tmp_path / "started")!r}).touch()
time.sleep(60)
"""
    script = ROOT / "launch" / "local_processes.sh"
    started = subprocess.Popen(
        ["bash", str(script), "1", "-c", leave], env={**environment(), "PYTHON": sys.executable}
    )
    deadline = time.monotonic() + 30
    while not any(tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.01)
    started.terminate()
    assert started.wait(timeout=30) == 3
