"""The operations that a stage's training takes, so that ways to a small model can be compared at
equal cost; see evals/flops.py for what counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from kd_jax.evals import flops
from kd_jax.recipes.blueprint import Blueprint
from kd_jax.recipes.parts import Part
from kd_jax.recipes.phases import Phase
from kd_jax.recipes.stage import Stage
from kd_jax.types import Params


def shape_of_step(setup: Any, stage: Stage) -> tuple[int, int, int]:
    """Rows and tokens of a batch, and positions of a row that reach the head."""
    batch = setup.task.shapes(stage.batch_size)
    objective = setup.plan(stage)[0].objective
    positions = jax.eval_shape(objective.prepare, batch).labels.shape[1]
    return *batch.tokens_BT.shape, positions


def of_parts(setup: Any, stage: Stage, parts: Sequence[Part]) -> int:
    """FLOPs of all steps, the teacher's forward passes among them. Where blocks are drawn at random
    the original's count as well as the compact ones."""
    shape = shape_of_step(setup, stage)
    total = 0
    for part in parts:
        params = part.abstract().params
        models = params["student"], setup.answering(stage), params["objective"]
        total += (part.end - part.start) * flops.train_step(*models, *shape)
    return total


def of_regression(setup: Any, stage: Stage, phase: Phase, steps: int) -> int:
    """FLOPs of the regression before a swap (fitting.py): it computes the blocks up to the last one
    that goes, and the gradients of all of these."""
    rows, tokens = setup.task.shapes(stage.batch_size).tokens_BT.shape

    def lower(model: Blueprint) -> Params:
        blocks = model.abstract().params["backbone"]["blocks"]
        return {"backbone": {layer: blocks[layer] for layer in range(max(phase.layers) + 1)}}

    models = lower(phase.model), [lower(phase.before)]
    return steps * flops.train_step(*models, {}, rows, tokens, 0, vocabulary=False)
