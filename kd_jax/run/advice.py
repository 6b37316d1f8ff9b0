"""Says where figures are worth less than they look: each finding is one sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from kd_jax.schedules import Schedule

UNIFORM = 0.99  # of the entropy of a uniform guess: a loss above this share knows nothing


def of_schedule(stage: str, learning_rate: Schedule, steps: int) -> list[str]:
    """Finds a stage that ends while its learning rate still rises."""
    if steps > 1 and learning_rate(steps - 1) > learning_rate(steps - 2):
        return [
            f"stage {stage}: its {steps} steps end while the learning rate still warms up; train "
            f"longer, or lower optim.schedule.warmup"
        ]
    return []


def of_end(
    stage: str, learning_rate: Schedule, ended: int, steps: int, best: int, patience: int
) -> list[str]:
    """Tells why a stage ended before its last step, and how much of its schedule was left."""
    if ended >= steps:
        return []
    peak = max(learning_rate(step) for step in range(ended))
    left = learning_rate(ended) / peak if peak else 0.0
    return [
        f"stage {stage} stopped after {ended} of {steps} steps: {patience} evaluations were no "
        f"better than that of step {best}; the learning rate was at {left:.0%} of its peak"
        + (": fewer steps, or more patience, would use its whole schedule" if left > 0.2 else "")
    ]


def of_figures(
    stages: Mapping[str, Mapping[str, Any]],
    primary: str,
    larger: bool,
    classes: int,
    teachers: Sequence[str],
    baselines: Sequence[str],
    students: Sequence[str],
) -> list[str]:
    """Finds figures of a run from which nothing follows.

    Args:
        stages: reported figures by stage.
        primary, larger: the figure that selects, and whether more of it is better.
        classes: how many a row or token has to choose from; 0 for a regression.
        teachers, baselines, students: names of stages: models that teach, that were trained on the
            labels alone, and that were distilled from the teachers.
    """
    found = [line for name, own in stages.items() for line in _guesses(name, own, classes)]
    known = {name: own[primary] for name, own in stages.items() if own.get(primary) is not None}

    def no_better(one: str, other: str) -> bool:
        if one not in known or other not in known:
            return False
        return known[one] <= known[other] if larger else known[one] >= known[other]

    for baseline in baselines:
        for teacher in teachers:
            if no_better(teacher, baseline):
                found.append(
                    f"{teacher} is no better than {baseline}, which had no teacher ({primary} "
                    f"{known[teacher]:.4f} and {known[baseline]:.4f}): there is nothing to distil"
                )
        for student in students:
            if no_better(student, baseline):
                found.append(
                    f"distillation did not help: {student} is no better than {baseline} ({primary} "
                    f"{known[student]:.4f} and {known[baseline]:.4f})"
                )
    return found


def _guesses(name: str, figures: Mapping[str, Any], classes: int) -> list[str]:
    """Finds a model that does no better than a guess that looks at nothing."""
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
