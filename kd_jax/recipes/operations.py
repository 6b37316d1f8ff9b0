"""The operations that a stage's training takes, so that ways to a small model can be compared at
equal cost; see evals/flops.py for what counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from kd_jax.evals import flops
from kd_jax.models.blueprint import Blueprint
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


def of_ensemble(setup: Any, stage: Stage, past: int) -> int:
    """FLOPs of all rounds of an ensemble that has `past` members before them. Where the text is
    fixed: its steps, and one pass over the rows by the teacher and by each member but the last;
    otherwise teacher and members answer in every step."""
    shape = shape_of_step(setup, stage)
    rounds, (_, tokens, positions) = setup.config.rounds, shape
    student, teacher = (setup.models[name].abstract().params for name in ("student", "teacher"))
    if setup.config.ensemble.fresh:
        beside = ([teacher, *[student] * (past + number)] for number in range(rounds))
        return stage.steps * sum(flops.train_step(student, each, {}, *shape) for each in beside)
    total = rounds * stage.steps * flops.train_step(student, [], {}, *shape)
    for model, passes in ((teacher, 1), (student, past + rounds - 1)):
        total += passes * flops.forward(model, len(setup.rows_N), tokens, positions)
    return total
