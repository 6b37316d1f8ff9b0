"""Manages the run directory, which describes its run and is continued by the same command."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import errno
import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from kd_jax import config as defaults
from kd_jax import storage
from kd_jax.errors import UserError
from kd_jax.report import runs
from kd_jax.run import origins
from kd_jax.run.models import TRAINED_HERE
from kd_jax.run.run import Run
from kd_jax.train import records
from kd_jax.types import Batch

log = logging.getLogger(__name__)

CONFIG, LOCK = "config.json", "lock"
# Written before the first step, besides its tokenizer and the folders of its stages.
OWN = (CONFIG, "manifest.json", "tokenizer.tmp", "pruned.json", "importance.json", "trials")

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "numpy")


def resolved(config: ConfigDict) -> dict:
    """Converts a config to plain JSON values."""
    return json.loads(config.to_json())


def config_hash(config: ConfigDict) -> str:
    """Computes eight hex digits, a hash of the resolved config as earlier versions wrote it."""
    text = json.dumps(defaults.reduce(resolved(config)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


@dataclasses.dataclass
class RunDirectory:
    """A run directory that this process has locked; a context manager."""

    folder: epath.Path
    name: str  # of configs/NAME.py
    lock: storage.Hold | None
    listeners: tuple[records.Listener, ...] = ()  # told of every row that the run writes
    command: str = ""  # that began it, where it was no command line
    commits: list[str] = dataclasses.field(default_factory=list)  # that the run was trained by

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *_: Any) -> None:
        if self.lock is None:
            return
        with contextlib.suppress(OSError):
            if [path.name for path in self.folder.iterdir()] == [LOCK]:
                (self.folder / LOCK).unlink()  # no check was passed: nothing is left
                self.folder.rmdir()
        self.lock.release()

    def begin(self, run: Run, data: dict) -> None:
        """Records the run's data, models and tokenizers once all checks have passed; and for each
        start the command, commit, versions and machine. Logs the programs that it runs.

        Raises UserError if data, teachers or tokenizers changed since the run began.
        """
        path = self.folder / "manifest.json"
        try:
            there = storage.read_json(path) if path.exists() else {}
        except UserError:
            there = {}
            log.warning(
                "%s is damaged, so that nobody knows what this run was begun with; set aside in %s",
                *(path, self.folder / "damaged"),
            )
            if jax.process_index() == 0:
                storage.set_aside(path, self.folder / "damaged")
        of = origins.of(run, data, there.get("of", {}))
        self._check_origins(there.get("of", {}), of)
        starts = there.get("starts", [])
        self.commits = [*dict.fromkeys(start["commit"] for start in starts)]
        if self.commits and commit() not in self.commits:
            log.warning(
                "%s was begun at commit %s, this is %s: the run goes on with other code",
                *(self.folder, ", ".join(self.commits), commit()),
            )
        self.commits = [*dict.fromkeys([*self.commits, commit()])]
        for line in programs(run):
            log.info("%s", line)
        if jax.process_index() > 0:
            return
        line = shlex.join([sys.executable, "-m", "kd_jax.main", *sys.argv[1:]])
        command = self.command or line
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        start = {"time": now, "command": command} | manifest()
        own = {"config": self.name, "config_hash": config_hash(run.config), "of": of}
        self.folder.mkdir(parents=True, exist_ok=True)
        storage.write_json(path, own | {"starts": [*starts, start]})
        if not (self.folder / CONFIG).exists():
            storage.write_json(self.folder / CONFIG, resolved(run.config))
        with (self.folder / "command.txt").open("a") as file:
            file.write(command + "\n")

    @contextlib.contextmanager
    def listening(self, config: ConfigDict) -> Iterator[tuple[records.Listener, ...]]:
        """Yields the functions to call with every recorded row: the listeners, and W&B if
        config.wandb names a project; only in the first process."""
        if not config.wandb or jax.process_index() > 0:
            yield self.listeners
            return
        about = config.wandb, self.folder.name, resolved(config), self.folder
        with records.wandb_listener(*about) as listener:
            yield (*self.listeners, listener)

    def _check_origins(self, began: dict, now: dict) -> None:
        changed = origins.changed(self.folder, began, now)
        if not changed:
            return
        advice = "put back what it began with, or give another --workdir"
        if not _trained(self.folder):
            _clear(self.folder)
            advice = (
                f"no step was trained on it, it is set aside in {self.folder}/before: run again"
            )
        raise UserError(f"{self.folder} was begun with other {', '.join(changed)}; {advice}")

    def about(self, run: Run, data: dict) -> dict[str, Any]:
        """Returns the description of the run, its models and data for results.json."""
        config = run.config
        found = {
            "config": self.name,
            "task": config.task.name,
            "config_hash": config_hash(config),
            "commit": commit(),
            "commits": self.commits,
            "seed": config.seed,
            "machine": machine(),
            "versions": manifest()["versions"],
            "models": {k: {"name": m.name, "commit": m.commit} for k, m in run.models.items()},
            "data": data,
            "split": run.split,
        }
        return found | ({"primary": run.task.primary} if run.task.of_examples else {})


def enter(
    config: ConfigDict,
    name: str,
    workdir: str | None,
    listeners: Sequence[records.Listener] = (),
    command: str = "",
) -> RunDirectory:
    """Makes, locks and prints the run directory: `workdir`, or runs/NAME-HASH of the config.

    Raises UserError if another process uses it, if it cannot be a folder, and if another config was
    trained there, naming the keys that differ.
    """
    folder = epath.Path(workdir or f"runs/{name}-{config_hash(config)}")
    first = jax.process_index() == 0
    if first:
        print(f"run directory: {folder}", flush=True)
    try:
        lock = None
        if first and "://" not in os.fspath(folder) and not (folder / "results.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            lock = storage.hold(folder / LOCK)
        _same_config(folder, config)
    except OSError as error:
        if isinstance(error, PermissionError) or error.errno in (errno.EROFS, errno.ENOSPC):
            raise
        reason = "it is there and no folder" if error.errno == errno.EEXIST else error.strerror
        raise UserError(f"--workdir={folder}: {reason}; give another folder") from None
    return RunDirectory(folder, name, lock, tuple(listeners), command)


def _same_config(folder: epath.Path, config: ConfigDict) -> None:
    """Raises UserError if another config was trained in `folder`. If nothing was trained there, the
    files of another config, or of a start that failed its checks, are moved aside."""
    path, wrong = folder / CONFIG, None
    try:
        now = resolved(config)
        there = defaults.complete(storage.read_json(path)) if path.exists() else now
        old, new = dict(runs.leaves(there)), dict(runs.leaves(now))
        differing = [
            f"{key} ({old.get(key)!r} there, {new.get(key)!r} here)"
            for key in sorted({*old, *new})
            if old.get(key) != new.get(key)
        ]
    except UserError:
        wrong, differing = f"{path} is damaged", []
    if path.exists() and not (wrong or differing):
        return
    if not _trained(folder):
        _clear(folder)
    elif differing:
        raise UserError(
            f"{folder} holds a run of another config; differing: {', '.join(differing)}. "
            f"Give another --workdir, or none"
        )
    else:
        _restore(path, wrong, config)


def _restore(path: epath.Path, wrong: str | None, config: ConfigDict) -> None:
    """Writes a lost config.json again, if the manifest shows that it was the same config."""
    record, wrong = path.parent / "manifest.json", wrong or f"{path} is missing"
    there = storage.read_json(record) if record.exists() else {}
    if there.get("config_hash") != config_hash(config):
        raise UserError(f"{wrong}; and nothing tells that {path.parent} holds a run of this config")
    log.warning("%s: written anew, by manifest.json it was this config", wrong)
    if jax.process_index() == 0:
        if path.exists():
            storage.set_aside(path, path.parent / "damaged")
        storage.write_json(path, resolved(config))


def _trained(folder: epath.Path) -> bool:
    """Tells whether any step was trained in a run directory."""
    stages = [stage for depth in ("*", "*/*/*") for stage in folder.glob(depth)]  # of trials too
    return (folder / "results.json").exists() or any(
        any((stage / "checkpoints").glob("*"))
        or ((stage / "metrics.csv").exists() and (stage / "metrics.csv").stat().length)
        for stage in stages
    )


def _clear(folder: epath.Path) -> None:
    """Moves aside the files of starts that trained nothing; other files stay."""
    if jax.process_index() > 0 or not folder.exists():
        return
    left = [folder / "tokenizer"] if (folder / "tokenizer" / TRAINED_HERE).exists() else []
    if (folder / "manifest.json").exists():  # begun: folders of stages have one of these files
        left += [folder / name for name in OWN if (folder / name).exists()]
        stages = [path for path in folder.iterdir() if not (path / "manifest.json").exists()]
        marks = ("results.json", "parameters.txt", "metrics.csv")
        left += [path for path in stages if any((path / mark).exists() for mark in marks)]
    for path in left:
        storage.set_aside(path, folder / "before")
    if left:
        log.info("no step was trained in %s: what is there is now in %s/before", folder, folder)


def manifest() -> dict:
    """Describes the versions, commit and devices of this process."""
    return {
        "commit": commit(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "machine": machine(),
        "processes": jax.process_count(),
    }


def machine() -> dict:
    """Describes the devices and the CPU of this machine."""
    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "device": device.device_kind,
        "devices": jax.device_count(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
    }


def programs(run: Run) -> list[str]:
    """Describes in lines the devices, the programs of a run, and the shapes that they are compiled
    for."""
    kind = f"{run.mesh.size} x {run.mesh.devices.flat[0].device_kind}"
    attention = run.policy.attention
    attention += ", blocks where it has dropout" if attention == "cudnn" else ""
    lines = [f"{kind}, {run.config.precision}, attention: {attention}"]
    if run.policy.on_cpu_in_bf16 and not _multiplies_bf16():
        lines.append("this CPU has no bfloat16 products: --config.precision=fp32 is faster here")
    for stage in run.stages:
        batch = _shape(run.tasks[stage.model].shapes(stage.batch_size))
        lines.append(f"train_step {stage.name}: {batch}, x{run.config.accumulate}")
    return [*lines, f"eval_step: {_shape(run.task.shapes(run.config.eval.batch_size))}"]


def _shape(batch: Batch) -> str:
    tokens, labels = ("x".join(map(str, each.shape)) for each in (batch.tokens_BT, batch.labels))
    return f"tokens {tokens}, labels {labels}"


@functools.cache
def commit() -> str:
    """Finds the git commit of kd_jax, with "+" behind it if files differ; "" outside of git."""
    folder = epath.Path(__file__).parent
    git = ["git", "-C", os.fspath(folder)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno", "--", "."], capture_output=True, text=True
        )
    except OSError:
        return ""
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def _cpu() -> str:
    about = _cpuinfo()
    return platform.processor() if about is None else about.get("model name", "")


def _multiplies_bf16() -> bool:
    """Tells whether the CPU has bfloat16 products; True where nothing says so."""
    about = _cpuinfo() or {}
    flags = about.get("flags") or about.get("Features")  # of x86, of ARM
    return flags is None or "bf16" in flags


def _cpuinfo() -> dict[str, str] | None:
    """Reads what the system says about the first core; None where it says nothing."""
    try:
        lines = epath.Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    except OSError:
        return None
    pairs = (line.partition(":") for line in lines)
    return {name.strip(): value.strip() for name, _, value in pairs}
