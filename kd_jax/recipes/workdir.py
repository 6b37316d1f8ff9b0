"""The run directory: it describes itself, and is entered again by the same command."""

import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from kd_jax.errors import UserError
from kd_jax.train import records

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "numpy")


def resolved(config: ConfigDict) -> dict:
    """The config as plain JSON values."""
    return json.loads(config.to_json())


def config_hash(config: ConfigDict) -> str:
    """Eight hex digits of the resolved config."""
    text = json.dumps(resolved(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def enter(config: ConfigDict, name: str, workdir: str | None) -> epath.Path:
    """The directory of this run: `workdir`, or runs/NAME-HASH of the config. Prints it.

    Raises UserError where `workdir` holds a run of another config, naming the keys that differ.
    """
    folder = epath.Path(workdir or f"runs/{name}-{config_hash(config)}")
    first = jax.process_index() == 0
    if first:
        print(f"run directory: {folder}", flush=True)
    path = folder / "config.json"
    if path.exists():
        differing = _differences(json.loads(path.read_text()), resolved(config))
        if differing:
            raise UserError(
                f"{folder} holds a run of another config; differing: {', '.join(differing)}. "
                f"Give another --workdir, or none"
            )
    elif first:
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / "manifest.json", {"config": name} | manifest())
        write(path, resolved(config))
    if first:
        with (folder / "command.txt").open("a") as file:
            file.write(shlex.join([sys.executable, "-m", "kd_jax.main", *sys.argv[1:]]) + "\n")
    return folder


def config_name(folder: epath.Path) -> str:
    """NAME of the configs/NAME.py that a run directory was made by."""
    return json.loads((folder / "manifest.json").read_text())["config"]


def manifest() -> dict:
    """Versions, commit and devices of this process."""
    return {
        "commit": commit(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "machine": machine(),
        "processes": jax.process_count(),
    }


def about(config: ConfigDict, folder: epath.Path) -> dict:
    """What results.json says of the run that its figures are of."""
    return {
        "config": config_name(folder),
        "task": config.task.name,
        "config_hash": config_hash(config),
        "commit": commit(),
        "seed": config.seed,
        "machine": machine(),
        "versions": manifest()["versions"],
    }


def machine() -> dict:
    """What the run ran on."""
    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "device": device.device_kind,
        "devices": jax.device_count(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
    }


def commit() -> str:
    """The project's git commit, with "+" behind it where files differ; "" outside a checkout."""
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


def open_wandb(config: ConfigDict, folder: epath.Path) -> Any:
    """The W&B run of config.wandb, in the first process; None where there is none."""
    if not config.wandb or jax.process_index() > 0:
        return None
    return records.open_wandb(config.wandb, folder.name, resolved(config), folder)


def write(path: epath.Path, value: Any) -> None:
    """JSON, written beside its place and renamed: it is there whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    temporary.replace(path)


def _cpu() -> str:
    try:
        lines = epath.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), "")


def _differences(old: dict, new: dict, prefix: str = "") -> list[str]:
    keys = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            keys += _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            keys.append(f"{prefix}{key} ({a!r} there, {b!r} here)")
    return keys
