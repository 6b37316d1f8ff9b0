"""Reads run directories: metrics and curves of stages, and differences between configurations."""

import csv
import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from kd_jax import config as defaults
from kd_jax import storage
from kd_jax.errors import UserError

LABEL_TERMS = ("ce", "mse")  # the terms of a loss that read the labels; others read the teacher
MOST_DIFFERENCES = 3  # in a label

Results = Mapping[str, Any]  # results.json: "seed", "stages", "split", "roles", "primary" ...
Columns = dict[str, np.ndarray]  # name -> float64 values, NaN where a row has none


@dataclasses.dataclass(frozen=True)
class Roles:
    """The names of the stages of a run that reports compare; "" for none."""

    teacher: str = ""  # what others are measured against: what they imitate, or were made of
    baseline: str = ""  # what the student is compared with: the same model, on the labels alone
    student: str = ""  # what the run is about


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
        """Returns the day on which the run began, as 2026-11-29; "" if it is not recorded."""
        path = self.workdir / "manifest.json"
        starts = _json(path).get("starts") if path.exists() else None
        return str(starts[0].get("time", ""))[:10] if starts else ""

    @property
    def command(self) -> str:
        """Returns the command that started the run, without Python's folder; "" if not recorded."""
        path = self.workdir / "command.txt"
        lines = path.read_text().splitlines() if path.exists() else []
        return re.sub(r"^\S*/", "", lines[0]) if lines else ""

    @property
    def stages(self) -> dict[str, dict[str, Any]]:
        """Returns the metrics of each stage, by its name."""
        return self.results["stages"]

    @property
    def task(self) -> str:
        """Returns the name of the task."""
        stated = self.results.get("task") or self.config.get("task") or {}
        return stated if isinstance(stated, str) else str(stated.get("name", "unknown task"))

    def no_stage(self, stage: str, have: Sequence[str]) -> UserError:
        """Makes the error for a stage that the run did not train; `have` lists those it did."""
        found = sorted(each.parent for each in self.workdir.glob("export/*/model.safetensors"))
        exports = ", ".join(str(each) for each in found if each.name != "ensemble")
        hint = f"; --model takes what it has exported: {exports}" if exports else ""
        return UserError(
            f"{self.workdir} has no stage {stage!r}; have: {', '.join(have) or 'none'}{hint}"
        )


def roles(results: Results) -> Roles:
    """Reads which stages are teacher, baseline and student; older runs have the usual names."""
    return Roles(**results.get("roles", defaults.ROLES))


def ordered(stages: Iterable[str]) -> list[str]:
    """Sorts stages as runs go through them: teacher, baseline, student, then others by name."""
    rank = {name: i for i, name in enumerate(defaults.STAGES)}
    return sorted(stages, key=lambda name: (rank.get(name, len(rank)), name))


def read(workdir: str) -> Run:
    """Reads a finished run. Raises UserError naming what is missing if the folder is not one."""
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
    results["stages"] = {name: results["stages"][name] for name in ordered(results["stages"])}
    return Run(folder, defaults.complete(config), results)


def curves(workdir: str) -> dict[str, Curves]:
    """Reads the curves of the stages that have any, finished or not."""
    folder = epath.Path(workdir)
    files = [*folder.glob("*/metrics.csv"), *folder.glob("*/eval.csv")]
    return {
        stage: Curves(
            training=read_columns(folder / stage / "metrics.csv"),
            validation=read_columns(folder / stage / "eval.csv"),
        )
        for stage in ordered({path.parent.name for path in files})
    }


def read_columns(path: epath.Path) -> Columns:
    """Reads the columns of a csv file, {} for a file that is missing or has no rows.

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
    """Describes how far an unfinished run has come, and how to continue it."""
    done = {path.parent.name for path in folder.glob("*/results.json")}
    begun = {path.parent.name for path in folder.glob("*/metrics.csv")} - done
    text = f"finished stages: {', '.join(ordered(done)) or 'none'}"
    text += f"; begun: {', '.join(ordered(begun))}" if begun else ""
    command = folder / "command.txt"
    again = f": {command.read_text().strip()}" if command.exists() else ""
    return f"{text}; run its command again to continue{again}"


def by_evaluation(training: Columns, validation: Columns) -> list[dict[str, float]]:
    """Summarizes training in a row for each evaluation; no rows if none was recorded.

    Args:
        training: metrics.csv of a stage.
        validation: its eval.csv.

    Returns:
        step; train_NAME: the mean of each column since the last evaluation; kd_to_ce: the weighted
        sum of the teacher's terms over that of the labels' terms, if there are both; NAME: the
        held-out metrics.
    """
    rows, last = [], 0.0
    for i, step in enumerate(validation.get("step", ())):
        steps = training.get("step", np.zeros(0))
        inside = (steps > last) & (steps <= step)
        row = {"step": int(step)}
        if inside.any():
            means = {name: float(np.nanmean(column[inside])) for name, column in training.items()}
            row |= {f"train_{name}": mean for name, mean in means.items() if name != "step"}
            ratio = distillation_ratio(means)
            row |= {} if ratio is None or not np.isfinite(ratio) else {"kd_to_ce": float(ratio)}
        row |= {name: float(column[i]) for name, column in validation.items() if name != "step"}
        rows.append(row)
        last = step
    return rows


def distillation_ratio(values: Mapping[str, Any]) -> Any:
    """Divides the sum of the weighted terms that use the teacher by the sum of those that use the
    labels; None if one kind is missing. `values` are of one step, or whole columns."""
    sums = [[], []]
    for key, value in values.items():
        if key.endswith("_weighted"):
            sums[key.removesuffix("_weighted") in LABEL_TERMS].append(value)
    teacher, labels = sums
    if not labels or not teacher:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.divide(sum(teacher), sum(labels))


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yields ("objective.kl.weight", 0.5), ... of nested dictionaries."""
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from leaves(value, f"{path}.{key}" if path else key)
    else:
        yield path, tree


def differences(configs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Lists how each configuration differs from the others: "kl.weight=0.3", the last two names of
    a key with its value, or "objective.hidden", a section that others lack. Seeds do not count.
    """
    found = [*_walk({i: {**config, "seed": None} for i, config in enumerate(configs)}, "")]
    keys = {key for _, key, _ in found}
    short = {key: ".".join(key.split(".")[-2:]) for key in keys}
    if len(set(short.values())) < len(keys):
        short = {key: key for key in keys}
    labels: list[list[str]] = [[] for _ in configs]
    for number, key, value in found:
        shown = '""' if value == "" else value
        labels[number].append(key if isinstance(value, dict) else f"{short[key]}={shown}")
    return labels


def _walk(found: Mapping[int, Any], path: str) -> Iterator[tuple[int, str, Any]]:
    """Yields (configuration, key, value) of every difference between configurations."""
    values = list(found.values())
    if all(value == values[0] for value in values):
        return
    if not all(isinstance(value, dict) for value in values):
        yield from ((i, path, value) for i, value in found.items())
        return
    for key in sorted({key for value in values for key in value}):
        having = {i: value[key] for i, value in found.items() if key in value}
        inner, own = f"{path}.{key}" if path else key, list(having.values())
        if len(having) < len(found) and all(value == own[0] for value in own):
            yield from ((i, inner, value) for i, value in having.items())
        else:
            yield from _walk(having, inner)
