"""Reads run directories: the figures of a finished run and the curves of its stages."""

import csv
import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from etils import epath

from kd_jax import storage
from kd_jax.errors import UserError

STAGES = (
    "teacher",
    "assistant",
    "baseline",
    "intermediate",
    "substitute",
    "one_shot",
    "prune",
    "theseus",
    "student",
    "ensemble",
)  # in the order of reading; others follow by name

Columns = dict[str, np.ndarray]  # name -> float64 values, NaN where a row has none


@dataclasses.dataclass(frozen=True)
class Curves:
    """The csv files of one stage; empty where a file is not there."""

    training: Columns  # metrics.csv: step, loss, terms, kl_t1, learning_rate, grad_norm
    validation: Columns  # eval.csv: step, loss, perplexity, accuracy, kl, agreement


@dataclasses.dataclass(frozen=True)
class Run:
    """One finished run."""

    workdir: epath.Path
    config: dict[str, Any]
    results: dict[str, Any]

    @property
    def seed(self) -> int:
        return self.results["seed"]

    @property
    def began(self) -> str:
        """The day, as 2026-11-29; "" for a run that did not note it."""
        path = self.workdir / "manifest.json"
        starts = _json(path).get("starts") if path.exists() else None
        return str(starts[0].get("time", ""))[:10] if starts else ""

    @property
    def command(self) -> str:
        """The command by which it was begun, without the folder of its Python; "" if not noted."""
        path = self.workdir / "command.txt"
        lines = path.read_text().splitlines() if path.exists() else []
        return re.sub(r"^\S*/", "", lines[0]) if lines else ""

    @property
    def stages(self) -> dict[str, dict[str, Any]]:
        """Figures by stage, in the order of reading."""
        return {name: self.results["stages"][name] for name in ordered(self.results["stages"])}

    def no_stage(self, stage: str, have: Sequence[str]) -> UserError:
        """What to raise for a stage that the run did not train; it did those of `have`."""
        found = sorted(each.parent for each in self.workdir.glob("export/*/model.safetensors"))
        exports = ", ".join(str(each) for each in found if each.name != "ensemble")
        hint = f"; --model takes what it has exported: {exports}" if exports else ""
        return UserError(
            f"{self.workdir} has no stage {stage!r}; have: {', '.join(have) or 'none'}{hint}"
        )


def ordered(stages: Iterable[str]) -> list[str]:
    """Stages as people read them: teacher, baseline, student, then the others by name."""
    rank = {name: i for i, name in enumerate(STAGES)}
    return sorted(stages, key=lambda name: (rank.get(name, len(rank)), name))


def read(workdir: str) -> Run:
    """A finished run. Raises UserError where the folder is no run, or names what is missing."""
    folder = epath.Path(workdir)
    if not folder.is_dir():
        raise UserError(f"{workdir}: no such folder; give run directories (main prints its own)")
    if not (folder / "config.json").exists():
        there = [path.parent for path in folder.glob("*/config.json")]
        inside = sorted(x.name for x in there if not (x / "model.safetensors").exists())
        hint = f"; these folders in it are runs: {', '.join(inside)}" if inside else ""
        hint = f"; {folder.parent} is one" if (folder.parent / "results.json").exists() else hint
        raise UserError(f"{workdir} is no run directory: it has no config.json{hint}")
    config = _json(folder / "config.json")
    if "model_type" in config:
        raise UserError(f"{workdir} is the folder of a model, not of a run; give it as --model")
    if not (folder / "results.json").exists():
        raise UserError(f"{workdir} is not finished: no results.json ({_progress(folder)})")
    results = _json(folder / "results.json")
    missing = [key for key in ("config", "seed", "stages") if key not in results]
    if missing:
        raise UserError(f"{folder / 'results.json'}: no {', '.join(missing)} in it; run it again")
    return Run(folder, config, results)


def curves(workdir: str) -> dict[str, Curves]:
    """Curves of the stages that have any, finished or not."""
    folder = epath.Path(workdir)
    found = {path.parent.name for path in folder.glob("*/metrics.csv")}
    found |= {path.parent.name for path in folder.glob("*/eval.csv")}
    return {
        stage: Curves(
            training=read_columns(folder / stage / "metrics.csv"),
            validation=read_columns(folder / stage / "eval.csv"),
        )
        for stage in ordered(found)
    }


def read_columns(path: epath.Path) -> Columns:
    """The columns of a csv file, {} where there is none or it has no rows.

    Raises UserError naming the line and column of a value that is no number.
    """
    if not path.exists():
        return {}
    reader = csv.DictReader(path.read_bytes().decode(errors="replace").splitlines())
    rows = list(reader)
    columns = {name: np.full(len(rows), np.nan) for name in reader.fieldnames or ()}
    for i, row in enumerate(rows):
        for name, column in columns.items():
            try:
                column[i] = float(row[name] or "nan")
            except ValueError:
                raise UserError(
                    f"{path}:{i + 2}: {name}={row[name]!r} is no number; repair or remove the line"
                ) from None
    return columns if rows else {}


def _json(path: epath.Path) -> dict[str, Any]:
    value = storage.read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: should hold a JSON object, not {type(value).__name__}")
    return value


def _progress(folder: epath.Path) -> str:
    """How far an unfinished run has come, and how to go on."""
    done = {path.parent.name for path in folder.glob("*/results.json")}
    begun = {path.parent.name for path in folder.glob("*/metrics.csv")} - done
    parts = [f"finished stages: {', '.join(ordered(done)) or 'none'}"]
    if begun:
        parts.append(f"begun: {', '.join(ordered(begun))}")
    command = folder / "command.txt"
    again = f": {command.read_text().strip()}" if command.exists() else ""
    return "; ".join(parts) + f"; run its command again to continue{again}"
