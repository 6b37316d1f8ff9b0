"""Starts jax.distributed: finds out the processes of a run, and connects them.

The first of these sources is used: the flags --coordinator, --process_id, --process_count; the
environment variables JAX_COORDINATOR_ADDRESS, JAX_PROCESS_COUNT and JAX_PROCESS_ID (or a Kubernetes
Job's JOB_COMPLETION_INDEX); SLURM, inside `srun`; a TPU pod, which JAX detects. Otherwise the run
has one process.
"""

import contextlib
import dataclasses
import logging
import os
import re
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import NoReturn

import jax

from kd_jax.errors import UserError, line

log = logging.getLogger(__name__)

# A process that says nothing for so long is dead, and JAX ends the others.
HEARTBEAT_SECONDS = 60


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The processes of a run, and the number of this one."""

    source: str  # where this was learnt, for messages
    coordinator: str  # HOST:PORT of process 0
    process_id: int
    process_count: int
    local_devices: int | None = None  # index of the one GPU to use; None: all that are visible

    def __post_init__(self):
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdecimal():
            raise UserError(f"{self.source}: coordinator {self.coordinator!r} is not HOST:PORT")
        if not 0 <= self.process_id < self.process_count:
            raise UserError(
                f"{self.source}: process id {self.process_id} of {self.process_count} processes; "
                f"ids go from 0 to {max(self.process_count - 1, 0)}"
            )


def initialize(
    coordinator: str | None = None,
    process_id: int | None = None,
    process_count: int | None = None,
    start_timeout: int = 300,
) -> None:
    """Joins the processes of the run, if there are several. Call it before JAX sees its devices.

    The arguments are the flags of these names. Raises UserError if they or the variables are
    incomplete; if the processes do not find each other within `start_timeout` seconds, prints one
    line and ends this process with status 1.
    """
    explicit = dict(coordinator=coordinator, process_id=process_id, process_count=process_count)
    cluster = detect(explicit, os.environ)
    jax.config.update("jax_enable_preemption_service", False)  # see preemption.py
    # JAX puts "tpu" first by itself where the machine has TPU chips and libtpu is installed.
    if cluster is None and (jax.config.jax_platforms or "").startswith("tpu"):
        _join_tpu_pod(start_timeout)
    elif cluster is not None and cluster.process_count > 1:
        join(cluster, start_timeout)
    if jax.distributed.is_initialized() and jax.process_index() > 0:
        logging.getLogger("kd_jax").setLevel(logging.WARNING)  # the first speaks for all


def detect(explicit: Mapping[str, object], environ: Mapping[str, str]) -> Cluster | None:
    """Finds the cluster in flags (`explicit`, each may be None) or environment variables; None if
    the run has one process."""
    given = {name: value for name, value in explicit.items() if value is not None}
    if given:
        missing = [f"--{name}" for name in explicit if name not in given]
        if missing:
            have = ", ".join(f"--{name}" for name in given)
            raise UserError(f"{have} given without {', '.join(missing)}: give all three or none")
        return Cluster("flags", **given)
    if "JAX_COORDINATOR_ADDRESS" in environ:
        own_id = "JAX_PROCESS_ID" if "JAX_PROCESS_ID" in environ else "JOB_COMPLETION_INDEX"
        return Cluster(
            source="environment",
            coordinator=environ["JAX_COORDINATOR_ADDRESS"],
            process_id=_integer(environ, own_id),
            process_count=_integer(environ, "JAX_PROCESS_COUNT"),
        )
    if {"SLURM_JOB_ID", "SLURM_PROCID", "SLURM_STEP_NODELIST"} <= environ.keys():
        return _slurm(environ)
    return None


def _slurm(environ: Mapping[str, str]) -> Cluster:
    # "node[017-019,030],other2": the coordinator is the first node, where task 0 runs.
    nodes = environ["SLURM_STEP_NODELIST"]
    prefix, number = re.match(r"([^,\[]*)(?:\[(\w+))?", nodes).groups()
    # Above Linux's range of ephemeral ports; steps of one job and neighbouring jobs differ.
    job, step = _integer(environ, "SLURM_JOB_ID"), int(environ.get("SLURM_STEP_ID", 0))
    port = 61440 + (31 * job + step) % 4096
    tasks, on_nodes = _integer(environ, "SLURM_NTASKS"), int(environ.get("SLURM_STEP_NUM_NODES", 1))
    # One task a node drives all GPUs of it; several take one each, unless SLURM has bound them.
    bound = "CUDA_VISIBLE_DEVICES" in environ and "," not in environ["CUDA_VISIBLE_DEVICES"]
    one_each = tasks > on_nodes and not bound
    return Cluster(
        source="SLURM",
        coordinator=f"{prefix}{number or ''}:{port}",
        process_id=_integer(environ, "SLURM_PROCID"),
        process_count=tasks,
        local_devices=_integer(environ, "SLURM_LOCALID") if one_each else None,
    )


def _integer(environ: Mapping[str, str], name: str) -> int:
    value = environ.get(name)
    if value is None or not value.isdecimal():
        raise UserError(f"environment variable {name} should be a number, not {value!r}")
    return int(value)


def join(cluster: Cluster, timeout: int) -> None:
    """Connects this process to the others of a cluster; see `initialize`."""
    own = f"process {cluster.process_id} of {cluster.process_count} ({cluster.source})"
    log.info("%s, coordinator %s", own, cluster.coordinator)
    if cluster.process_id == 0:
        try:  # jax.distributed may crash on the way out after a failure, so ask before
            socket.create_server(("", int(cluster.coordinator.rpartition(":")[2]))).close()
        except OSError as error:
            raise UserError(
                f"{own}: cannot listen at {cluster.coordinator} ({line(error)}): choose another "
                f"port"
            ) from None
    with _within(timeout, lambda: f"{own}: after {timeout} s, {_diagnosis(cluster)}"):
        jax.distributed.initialize(
            coordinator_address=cluster.coordinator,
            num_processes=cluster.process_count,
            process_id=cluster.process_id,
            local_device_ids=cluster.local_devices,
            cluster_detection_method="deactivate",
            initialization_timeout=timeout + 60,  # the watchdog is first
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )


def _join_tpu_pod(timeout: int) -> None:
    question = "is the same command running on all hosts of this TPU pod?"
    with _within(timeout, lambda: f"{timeout} s are over and processes are missing; {question}"):
        try:
            jax.distributed.initialize(
                initialization_timeout=timeout + 60, heartbeat_timeout_seconds=HEARTBEAT_SECONDS
            )
        except (RuntimeError, ValueError, OSError) as error:
            raise UserError(
                f"cannot find the hosts of this TPU pod ({line(error)}); give --coordinator, "
                f"--process_id and --process_count"
            ) from error


def _diagnosis(cluster: Cluster) -> str:
    """Explains why the processes may not have found each other."""
    if cluster.process_id == 0:
        return (
            f"some of the {cluster.process_count} processes have not come to "
            f"{cluster.coordinator}; are they running, and can they reach this machine?"
        )
    host, _, port = cluster.coordinator.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError as error:
        return (
            f"process 0 cannot be reached at {cluster.coordinator} ({line(error)}); is it "
            f"running, and is the address right?"
        )
    return f"process 0 is at {cluster.coordinator}, but other processes have not come to it"


@contextlib.contextmanager
def _within(seconds: float, message: Callable[[], str]) -> Iterator[None]:
    """Ends the process with a message if the block takes too long. jax.distributed would abort with
    a stack dump, and no exception can interrupt it while it waits."""

    def end() -> NoReturn:
        print(f"error: {message()}", file=sys.stderr, flush=True)
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
