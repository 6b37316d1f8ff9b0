"""How a stage of fine-tuning is taught: from logits that were computed before, or by teachers that
answer at every step."""

from __future__ import annotations

import logging

import jax
import numpy as np

from kd_jax.data.buckets import BucketStream
from kd_jax.data.encoded import Encoded
from kd_jax.errors import UserError
from kd_jax.models.layers import MASKED
from kd_jax.objectives.combine import Objective
from kd_jax.recipes.answers import Answers
from kd_jax.recipes.finetune_setup import FinetuneSetup
from kd_jax.recipes.stage import Stage
from kd_jax.teachers.several import Member, Several, Stored
from kd_jax.train.step import Teacher
from kd_jax.types import Batch

log = logging.getLogger(__name__)


def teaching(
    setup: FinetuneSetup, this: Stage, objective: Objective, answers: Answers
) -> tuple[Teacher | None, BucketStream]:
    """The teacher of a stage, None where it has none, and the batches that it goes with."""
    task, seed = setup.tasks[this.model], setup.config.seed
    processes = dict(process_index=jax.process_index(), process_count=jax.process_count())
    stream = task.train(this.batch_size, seed, **processes)
    if not this.learns:
        return None, stream
    names = setup.teachers_of(this)
    rows, together = ask_teachers(setup, this, answers), ", ".join(names)
    if rows is None:
        states = objective.needs_teacher_states
        why = "the objective reads more than logits" if states else "cache.max_gb is 0"
        log.info("%s: %s at every step, since %s", this.name, together, why)
        return _online(setup, this, names, answers, stream)
    log.info("%s: logits of %s, computed once for each row", this.name, together)
    return Stored(), stream.map(attach(rows, setup.head == "span", len(task.labels)))


def ask_teachers(setup: FinetuneSetup, this: Stage, answers: Answers) -> list | None:
    """The logits of a stage's teachers, together, of all training rows that it will see; None
    where it has no teachers, or where they have to answer at every step."""
    plan, _ = setup.plan(this)
    if not this.learns or plan.objective.needs_teacher_states or not setup.config.cache.max_gb:
        return None
    stream, ids_N = setup.tasks[this.model].train(this.batch_size, setup.config.seed), None
    if this.steps < stream.steps_per_epoch:
        ids_N = np.concatenate([stream[step].ids_B for step in range(this.steps)])
        ids_N = ids_N[ids_N >= 0]
    names, weights = setup.teachers_of(this), setup.weights_of(this)
    return answers.together(names, weights, setup.config.average, "train", ids_N)


def check_tokens(setup: FinetuneSetup, this: Stage, objective: Objective) -> None:
    """Raises UserError where a stage is compared with its teachers token by token, and one of them
    reads the examples in other tokens."""
    if setup.head != "span" and not objective.needs_teacher_states:
        return
    what = "its loss" if setup.head == "span" else "a loss on hidden states or attention"
    for name in setup.teachers_of(this):
        ours, theirs = (setup.tasks[model].rows("train") for model in (this.model, name))
        if not _same_tokens(ours, theirs):
            raise UserError(
                f"{name} {setup.models[name].name} has another tokenizer than the {this.model}, "
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
    setup: FinetuneSetup, this: Stage, names: tuple[str, ...], answers: Answers, stream
) -> tuple[Teacher, BucketStream]:
    """Teachers in the step; those that read other tokens, or token types, get their rows with the
    batch."""
    ours = setup.tasks[this.model].rows("train")
    theirs = {name: setup.tasks[name].rows("train") for name in names}
    aligned = {name: _same_tokens(ours, theirs[name]) for name in names}
    foreign = [n for n in names if not (aligned[n] and _same_types(ours, theirs[n]))]
    if len(names) == 1 and not foreign and setup.orders[names[0]] is None:
        return answers.model(names[0]), stream
    models = {name: answers.model(name) for name in names}
    members = tuple(
        Member(
            name,
            models[name].graphdef,
            weight,
            setup.orders[name],
            foreign.index(name) if name in foreign else None,
        )
        for name, weight in zip(names, setup.weights_of(this), strict=True)
    )
    params = {name: model.params for name, model in models.items()}
    teacher = Several(params, members, setup.config.average)
    if not foreign:
        return teacher, stream
    # Rows of other tokens need not be as long as the student's: one length, whatever the bucket.
    longest = [0 if aligned[name] else setup.tasks[name].length("train") for name in foreign]

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
