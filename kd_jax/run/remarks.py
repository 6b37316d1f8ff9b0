"""Writes sentences on a run's data and stages, and warnings about meaningless results."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from kd_jax.run.stage import Stage
from kd_jax.tasks.task import Task
from kd_jax.train.loop import Fit

UNIFORM = 0.99  # of the loss of a uniform guess: a model beyond this knows nothing
CLASSES = 8  # that are counted in a sentence


def of_data(data: Mapping[str, Mapping[str, Any]], seq_len: int) -> list[str]:
    """Describes each split: its size, classes, longest text, and how much does not fit into a row.
    `data`: see `Task.prepare`."""
    found = []
    for split, about in data.items():
        sizes = [
            f"{about[key]:,} {key}"
            for key in ("examples", "documents", "conversations", "tokens", "rows")
            if key in about
        ]
        text = f"{split}: {about['name']}, {', '.join(sizes)}"
        if classes := about.get("classes"):
            shown = [f"{name} {count:,}" for name, count in [*classes.items()][:CLASSES]]
            shown += [f"{len(classes) - CLASSES} more"] if len(classes) > CLASSES else []
            text += f"; classes: {', '.join(shown)}"
        if about.get("longest"):
            text += f"; the longest has {about['longest']:,} tokens"
        if cut := about.get("cut"):
            count = about.get("examples") or about.get("conversations") or about["rows"]
            text += f"; {cut:,} ({cut / count:.1%}) do not fit into {seq_len} tokens"
        found.append(text)
    return found


def of_stage(stage: Stage) -> str:
    """Describes a stage before it runs, and warns if all of it is warm-up."""
    terms = ", ".join(stage.program.objective.names)
    teachers = f" from {', '.join(stage.teachers)}" if stage.learns else ""
    epochs = f" ({stage.epochs:g} epochs)" if stage.epochs else ""
    text = (
        f"{stage.name}: {stage.steps:,} steps of {stage.batch_size} rows{epochs}, {terms}{teachers}"
    )
    rate, last = stage.schedules.learning_rate, stage.steps - 1
    if last > 0 and rate(last) > rate(last - 1):
        text += (
            "; it ends while the learning rate still warms up: train longer, or lower "
            "optim.schedule.warmup"
        )
    return text


def of_end(stage: Stage, fitted: Fit) -> list[str]:
    """Explains why a stage ended before its last step, and how much of its schedule was left."""
    ended, rate = fitted.steps, stage.schedules.learning_rate
    if ended >= stage.steps:
        return []
    peak = max(rate(step) for step in range(ended))
    left = rate(ended) / peak if peak else 0.0
    text = (
        f"{stage.name} stopped after {ended:,} of {stage.steps:,} steps: nothing was better than "
        f"step {fitted.best_step:,} (config.patience); the learning rate was at {left:.0%} of its "
        f"peak"
    )
    unused = ": a schedule of fewer steps, or more patience, would use it up"
    return [text + (unused if left > 0.2 else "")]


def of_figures(
    stages: Mapping[str, Mapping[str, Any]], task: Task, roles: Mapping[str, str]
) -> list[str]:
    """Warns about reported metrics that mean nothing, such as a teacher no better than chance.

    Args:
        stages: metrics by stage.
        task: the task, for its primary metric and its number of classes or tokens.
        roles: the names of the stages "teacher", "baseline" and "student", "" for none.
    """
    classes = 0
    if task.head in ("mlm", "clm"):
        classes = len(task.tokenizer) if task.tokenizer else 0
    elif task.head == "classification" and not task.regression:
        classes = len(task.labels)
    found = [line for name, own in stages.items() for line in _guesses(name, own, classes)]
    key = task.primary
    teacher, baseline, student = (roles.get(name) for name in ("teacher", "baseline", "student"))

    def no_better(one: str | None, other: str | None) -> str:
        ours, theirs = (stages.get(name or "", {}).get(key) for name in (one, other))
        if ours is None or theirs is None or (ours > theirs if task.larger else ours < theirs):
            return ""
        return f"{one} is no better than {other} ({key} {ours:.4f} and {theirs:.4f})"

    if text := no_better(teacher, baseline):
        found.append(f"{text}, which had no teacher: there is nothing to distil")
    if text := no_better(student, baseline):
        found.append(f"distillation did not help: {text}")
    return found


def _guesses(name: str, figures: Mapping[str, Any], classes: int) -> list[str]:
    """Warns about a model that is no better than guessing without reading the input."""
    loss, confusion = figures.get("loss"), figures.get("confusion")
    if classes > 1 and loss is not None and loss >= UNIFORM * math.log(classes):
        return [
            f"{name} has learnt nothing: its loss of {loss:.4f} is that of a uniform guess among "
            f"{classes:,}, {math.log(classes):.4f}"
        ]
    if confusion and figures.get("accuracy") is not None:
        counts = [sum(row) for row in confusion]
        most = max(counts) / sum(counts)
        if figures["accuracy"] <= most:
            return [
                f"{name} is no better than naming the most frequent class always (accuracy "
                f"{figures['accuracy']:.4f} and {most:.4f})"
            ]
    return []
