"""Training seen from evaluation to evaluation: means of every column, and what distillation weighs
against the labels."""

import numpy as np

from kd_jax.evals.runs import Columns

LABEL_TERMS = ("ce", "mse")  # the terms of a loss that read the labels; others read the teacher


def table(training: Columns, validation: Columns) -> list[dict[str, float]]:
    """One row an evaluation, {} columns where nothing was recorded.

    Args:
        training: metrics.csv of a stage.
        validation: its eval.csv.

    Returns:
        step; train_NAME: the mean of each column since the last evaluation; kd_to_ce: weighted
        sum of the terms that read the teacher over that of those that read the labels, where
        there are both; NAME: the held-out figures.
    """
    rows, last = [], 0.0
    for i, step in enumerate(validation.get("step", ())):
        steps = training.get("step", np.zeros(0))
        inside = (steps > last) & (steps <= step)
        row = {"step": int(step)}
        if inside.any():
            means = {name: float(np.nanmean(column[inside])) for name, column in training.items()}
            row |= {f"train_{name}": mean for name, mean in means.items() if name != "step"}
            row |= _ratio(means)
        row |= {name: float(column[i]) for name, column in validation.items() if name != "step"}
        rows.append(row)
        last = step
    return rows


def _ratio(means: dict[str, float]) -> dict[str, float]:
    weighted = {k.removesuffix("_weighted"): v for k, v in means.items() if k.endswith("_weighted")}
    labels = sum(value for name, value in weighted.items() if name in LABEL_TERMS)
    teacher = sum(value for name, value in weighted.items() if name not in LABEL_TERMS)
    if labels <= 0 or len(weighted) == len([n for n in weighted if n in LABEL_TERMS]):
        return {}
    return {"kd_to_ce": teacher / labels}
