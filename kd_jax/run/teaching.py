"""How a stage is taught: from logits that were computed before, or by teachers that answer at every
step."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from kd_jax.data.encoded import Encoded
from kd_jax.data.loader import BucketStream
from kd_jax.errors import UserError
from kd_jax.models.layers import MASKED
from kd_jax.run.answers import Answers
from kd_jax.run.run import Run
from kd_jax.run.stage import Stage
from kd_jax.teachers.several import Member, Several, Stored
from kd_jax.train.step import Teacher
from kd_jax.types import Batch

log = logging.getLogger(__name__)


def teaching(run: Run, this: Stage, answers: Answers) -> tuple[Teacher | None, Any]:
    """The teacher of a stage, None where it has none, and the batches that it goes with."""
    task, names = run.tasks[this.model], this.teachers
    stream = task.train(this.batch_size, run.config.seed, **run.processes)
    if not this.learns:
        return None, stream
    if not task.of_examples:
        return answers.model(names[0]), stream
    rows, together = ask_teachers(run, this, answers), ", ".join(names)
    if rows is None:
        states = this.program.objective.needs_teacher_states
        why = "the objective reads more than logits" if states else "cache.max_gb is 0"
        log.info("%s: %s at every step, since %s", this.name, together, why)
        return _online(run, this, answers, stream)
    log.info("%s: logits of %s, computed once for each row", this.name, together)
    return Stored(), stream.map(attach(rows, run.head == "span", len(task.labels)))


def ask_teachers(run: Run, this: Stage, answers: Answers) -> list | None:
    """The logits of a stage's teachers, together, of all training rows that it will see; None
    where it has no teachers, or where they have to answer at every step."""
    task, cache = run.tasks[this.model], run.config.get("cache")
    if not (this.learns and task.of_examples and cache and cache.max_gb):
        return None
    if this.program.objective.needs_teacher_states:
        return None
    stream, ids_N = task.train(this.batch_size, run.config.seed), None
    if this.steps < stream.steps_per_epoch:
        ids_N = np.concatenate([stream[step].ids_B for step in range(this.steps)])
        ids_N = ids_N[ids_N >= 0]
    return together(run, this, answers, "train", ids_N)


def together(
    run: Run, this: Stage, answers: Answers, split: str, ids_N: np.ndarray | None = None
) -> list:
    """The logits of a stage's teachers, averaged, of the rows of a split."""
    weights = run.weights(this.teachers)
    return answers.together(
        this.teachers, weights, run.config.get("average", "logits"), split, ids_N
    )


def check_tokens(run: Run, this: Stage) -> None:
    """Raises UserError where a stage is compared with its teachers token by token, and one of them
    reads the examples in other tokens."""
    if run.head != "span" and not this.program.objective.needs_teacher_states:
        return
    what = "its loss" if run.head == "span" else "a loss on hidden states or attention"
    for name in this.teachers:
        ours, theirs = (run.tasks[model].rows("train") for model in (this.model, name))
        if not _same_tokens(ours, theirs):
            raise UserError(
                f"{name} {run.models[name].name} has another tokenizer than the {this.model}, "
                f"and {what} compares token by token: choose a teacher of the same tokenizer"
            )


def attach(rows: list, spans: bool, classes: int):
    """Gives each batch its rows' logits, as a teacher computed them before; padding is MASKED."""
    if not spans:
        table_NC = np.zeros((len(rows), classes), np.float32)
        for i, logits_C in enumerate(rows):
            if logits_C is not None:
                table_NC[i] = logits_C
        return lambda batch: batch.replace(teacher_logits_BPC=table_NC[batch.ids_B][:, None])

    def padded(batch: Batch) -> Batch:
        B, T = batch.tokens_BT.shape
        logits_B2T = np.full((B, 2, T), MASKED, np.float32)
        for row, i in zip(logits_B2T, batch.ids_B, strict=True):
            if i >= 0:
                row[:, : rows[i].shape[1]] = rows[i]
        return batch.replace(teacher_logits_BPC=logits_B2T)

    return padded


def _online(
    run: Run, this: Stage, answers: Answers, stream: BucketStream
) -> tuple[Teacher, BucketStream]:
    """Teachers in the step; those that read other tokens, or token types, get their rows with the
    batch."""
    names = this.teachers
    ours = run.tasks[this.model].rows("train")
    theirs = {name: run.tasks[name].rows("train") for name in names}
    aligned = {name: _same_tokens(ours, theirs[name]) for name in names}
    foreign = [n for n in names if not (aligned[n] and _same_types(ours, theirs[n]))]
    if len(names) == 1 and not foreign and run.order(names[0]) is None:
        return answers.model(names[0]), stream
    models = {name: answers.model(name) for name in names}
    members = tuple(
        Member(
            name,
            models[name].graphdef,
            weight,
            run.order(name),
            foreign.index(name) if name in foreign else None,
        )
        for name, weight in zip(names, run.weights(names), strict=True)
    )
    params = {name: model.params for name, model in models.items()}
    teacher = Several(params, members, run.config.average)
    if not foreign:
        return teacher, stream
    # Rows of other tokens need not be as long as the student's: one length, whatever the bucket.
    longest = [0 if aligned[name] else run.tasks[name].length("train") for name in foreign]

    def encode(batch: Batch) -> Batch:
        ids_B, T = np.maximum(batch.ids_B, 0), batch.tokens_BT.shape[1]
        pairs = zip(foreign, longest, strict=True)
        inputs = (theirs[name].encoding(ids_B, length or T) for name, length in pairs)
        return batch.replace(teacher_inputs=tuple(inputs))

    return teacher, stream.map(encode)


def _same_tokens(ours: Encoded, theirs: Encoded) -> bool:
    return np.array_equal(ours.lengths_N, theirs.lengths_N) and np.array_equal(
        ours.tokens_F, theirs.tokens_F
    )


def _same_types(ours: Encoded, theirs: Encoded) -> bool:
    """Whether equal tokens have equal types, which are 0 where the tokenizer gives none."""
    zeros_F = np.zeros_like(ours.tokens_F)
    types = [zeros_F if rows.types_F is None else rows.types_F for rows in (ours, theirs)]
    return np.array_equal(*types)
