"""Makes the teacher of a stage: teachers that run in the step, or their stored logits."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from kd_jax.data.encoded import Encoded
from kd_jax.data.loader import BucketStream
from kd_jax.errors import UserError
from kd_jax.models.layers import MASKED
from kd_jax.run import text_logits
from kd_jax.run.run import Run
from kd_jax.run.stage import Stage
from kd_jax.run.teacher_logits import TeacherLogits
from kd_jax.run.text_logits import TextLogits, cache_settings
from kd_jax.teachers.ensemble import TEACHER, Stored
from kd_jax.teachers.several import Member, Several
from kd_jax.train.step import Teacher
from kd_jax.types import Batch, StoredLogits

log = logging.getLogger(__name__)


def teaching(run: Run, this: Stage, logits: TeacherLogits) -> tuple[Teacher | None, Any]:
    """Returns the teacher of a stage, or None, and the stage's batches with the teacher's inputs.

    Teachers run in the step, or their logits are read from disk.
    """
    task, names = run.tasks[this.model], ", ".join(this.teachers)
    stream = task.train(this.batch_size, run.config.seed, **run.processes)
    if not this.learns:
        return None, stream
    found = stored_logits(run, this, logits)
    if found is not None:
        log.info("%s: logits of %s, computed once for each row", this.name, names)
    if task.of_examples:
        if found is not None:
            classes = len(task.labels)
            return Stored(classes), stream.map(attach(found, run.head == "span", classes))
        states = this.program.objective.needs_teacher_states
        why = "the objective reads more than logits" if states else "cache.max_gb is 0"
        log.info("%s: %s at every step, since %s", this.name, names, why)
        return _online(run, this, logits, stream)
    if found is None:
        return logits.model(this.teachers[0]), stream
    text, store = found
    return Stored(text.vocab_size), stream.map(lambda batch: text.attach(batch, {TEACHER: store}))


def stored_logits(run: Run, this: Stage, logits: TeacherLogits) -> Any:
    """Returns the averaged logits of a stage's teachers for all training rows that it will see; for
    text, as (text, store) on disk. Computes missing ones. None if the stage has no teachers, or
    runs them in the step."""
    task = run.tasks[this.model]
    if not task.of_examples:
        return _text(run, this, logits) if text_logits.are_kept(run, this) else None
    if not (this.learns and "cache" in run.config and cache_settings(run)["max_gb"]):
        return None
    if this.program.objective.needs_teacher_states:
        return None
    stream, ids_N = task.train(this.batch_size, run.config.seed), None
    if this.steps < stream.steps_per_epoch:
        ids_N = np.concatenate([stream[step].ids_B for step in range(this.steps)])
        ids_N = ids_N[ids_N >= 0]
    return together(run, this, logits, "train", ids_N)


def together(
    run: Run, this: Stage, logits: TeacherLogits, split: str, ids_N: np.ndarray | None = None
) -> list:
    """Averages the logits of a stage's teachers over the rows of a split."""
    weights, space = run.weights(this.teachers), run.config.get("average", "logits")
    return logits.together(this.teachers, weights, space, split, ids_N)


def _text(run: Run, this: Stage, logits: TeacherLogits) -> tuple[TextLogits, Any]:
    everywhere = bool(this.program.objective.everywhere)
    name, seed = this.teachers[0], run.config.seed
    key = name, this.model, this.batch_size, this.steps, seed, everywhere
    if key not in logits.text:
        stream = run.task.train(this.batch_size, seed, **run.processes)
        steps, (size, k) = text_logits.steps_of_new_rows(run, this), text_logits.sizes(run, this)
        text = TextLogits(run, stream, steps, size, lambda tokens: k, everywhere=everywhere)
        logits.text[key] = text, text.of(name, [logits.model(name)])
    return logits.text[key]


def check(run: Run, this: Stage) -> None:
    """Raises UserError if a stage cannot learn from its teachers: all of their weights are 0, they
    read other tokens, or a term needs more than stored logits."""
    if run.task.of_examples:
        if cache_settings(run)["logits"]:
            raise UserError("config.cache.logits is for language models; set config.cache.max_gb")
        run.weights(this.teachers)
        check_tokens(run, this)
    elif text_logits.are_kept(run, this):
        whose = "a teacher that is read from disk (config.cache.logits)"
        text_logits.check_terms(this.program.objective, whose)


def check_tokens(run: Run, this: Stage) -> None:
    """Raises UserError if a teacher that is compared token by token tokenizes the examples
    differently."""
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
    """Makes a function that adds stored logits of a teacher to a batch; padding is MASKED."""

    def with_logits(batch: Batch, logits_BPC: np.ndarray) -> Batch:
        return batch.replace(stored={TEACHER: StoredLogits(logits_BPC)})

    if not spans:
        table_NC = np.zeros((len(rows), classes), np.float32)
        for i, logits_C in enumerate(rows):
            if logits_C is not None:
                table_NC[i] = logits_C
        return lambda batch: with_logits(batch, table_NC[batch.ids_B][:, None])

    def padded(batch: Batch) -> Batch:
        B, T = batch.tokens_BT.shape
        logits_B2T = np.full((B, 2, T), MASKED, np.float32)
        for row, i in zip(logits_B2T, batch.ids_B, strict=True):
            if i >= 0:
                row[:, : rows[i].shape[1]] = rows[i]
        return with_logits(batch, logits_B2T)

    return padded


def _online(
    run: Run, this: Stage, logits: TeacherLogits, stream: BucketStream
) -> tuple[Teacher, BucketStream]:
    """Returns teachers that run in the step, and batches with the inputs of teachers whose tokens
    or token types differ."""
    names = this.teachers
    ours = run.tasks[this.model].rows("train")
    theirs = {name: run.tasks[name].rows("train") for name in names}
    aligned = {name: _same_tokens(ours, theirs[name]) for name in names}
    foreign = [n for n in names if not (aligned[n] and _same_types(ours, theirs[n]))]
    if len(names) == 1 and not foreign and run.order(names[0]) is None:
        return logits.model(names[0]), stream
    models = {name: logits.model(name) for name in names}
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
    """Tells whether two encodings have equal token types; without any they are 0."""
    zeros_F = np.zeros_like(ours.tokens_F)
    types = [zeros_F if rows.types_F is None else rows.types_F for rows in (ours, theirs)]
    return np.array_equal(*types)
