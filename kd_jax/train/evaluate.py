"""Held-out figures: every batch of a stream through the eval step, sums divided once."""

import jax
import numpy as np

from kd_jax.train.sharding import place
from kd_jax.train.step import Plan, eval_step
from kd_jax.types import Model


def evaluate(student: Model, stream, teacher: Model | None, plan: Plan) -> dict[str, float]:
    """Mean of each term of `plan.objective` over the stream's supervised rows, in float64."""
    totals: dict[str, np.ndarray] = {}
    for batch in stream.batches():
        ratios = jax.device_get(eval_step(student, place(batch, plan.mesh), teacher, plan=plan))
        for name, ratio in ratios.items():
            pair = np.array([ratio.total, ratio.weight], np.float64)
            totals[name] = totals.get(name, 0.0) + pair
    return {name: float(total / max(weight, 1e-30)) for name, (total, weight) in totals.items()}
