"""Finds who teaches a stage: logits that were computed before, or teachers in the step.

Logits of examples are read from disk (teachers/store.py) where some run computed them; the others
are computed now, each row once, and kept. Rows keep to the order of the split.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from kd_jax.data.encoded import Encoded
from kd_jax.data.loader import BucketStream, lengths_of_pass
from kd_jax.errors import UserError
from kd_jax.models import family
from kd_jax.models.layers import MASKED
from kd_jax.run import text_logits
from kd_jax.run.run import Run
from kd_jax.run.stage import Stage
from kd_jax.run.text_logits import TextLogits, cache_settings, folder, identity_of
from kd_jax.teachers.ensemble import TEACHER, Member, Several, Stored, average, in_order
from kd_jax.teachers.store import NOT_FINITE, LogitStore
from kd_jax.train import sharding
from kd_jax.train.passes import predict
from kd_jax.train.state import TrainState
from kd_jax.train.step import Teacher
from kd_jax.types import Batch, Model, Params, StoredLogits

log = logging.getLogger(__name__)

FITTED = 4096  # at least so many texts, if there are, to which parameters are fitted


class TeacherLogits:
    """The frozen models of a run, and their logits over its splits."""

    def __init__(self, run: Run, given: dict[str, Params]):
        """Stores `given`, parameters by model; entries may be added later, before their use."""
        self._run, self.given = run, given
        self._rows: dict[tuple[str, str], list[np.ndarray | None]] = {}
        # As a teacher, on the mesh.
        self.model = functools.cache(lambda name: frozen(run, name, given[name]))
        self._store = functools.cache(self._open)
        self._last: tuple[Any, Any] = None, None  # what `once` made last, and its key

    def once(self, key: tuple, make: Callable[[], Any]) -> Any:
        """Returns what `make` made for the same key in the call before; else calls it."""
        if self._last[0] != key:
            self._last = None, None  # lets go of it first
            self._last = key, make()
        return self._last[1]

    def of(self, name: str, split: str, ids_N: np.ndarray | None = None) -> list:
        """Returns a model's logits of every row of a split: (C,) in the task's order of classes, a
        vector (D,), or (2, length). With `ids_N`, only of those rows: others may be None."""
        rows = self._run.tasks[name].rows(split)
        found = self._rows.setdefault((name, split), [None] * len(rows))
        asked = np.arange(len(rows)) if ids_N is None else np.unique(ids_N)
        new = np.array([i for i in asked if found[i] is None], np.int64)
        if len(new):
            order = self._run.order(name)
            for i, logits in zip(new, self._compute(name, split, new), strict=True):
                found[i] = in_order(logits, order)
        return found

    def _compute(self, name: str, split: str, ids_N: np.ndarray) -> list[np.ndarray]:
        run, rows = self._run, self._run.tasks[name].rows(split)
        digests, store = [rows.digests[i] for i in ids_N], self._store(name)
        found = [None] * len(ids_N)
        if store is not None:
            there = (row and row.values_BPK for row in store.read(digests))
            found = [row[0] if row is not None and len(row) == 1 else row for row in there]
        missing_N = np.array([logits is None for logits in found])
        if jax.process_count() > 1:  # hosts may have other files, and compute together
            missing_N = multihost_utils.process_allgather(missing_N).any(axis=0)
        new = np.flatnonzero(missing_N)
        if len(new):
            log.info("%s: %s of %s rows are computed", name, _outputs(run), f"{len(new):,}")
            size, lengths_N = run.config.eval.batch_size, rows.lengths_N[ids_N[new]]
            part = BucketStream(
                lengths_N,
                lengths_of_pass(lengths_N, run.tasks[name].seq_len, size),
                lambda ids_B, length: rows.batch(ids_N[new][ids_B], length),
                size,
                **run.processes,
            )
            computed = predict(self.model(name), part.batches(), run.mesh, family.PARTITION)
            for i in new:
                found[i] = computed[int(ids_N[i])]
        self._check_finite(name, split, ids_N, found)
        if len(new) and store is not None:
            logits = [StoredLogits(np.atleast_2d(found[i])) for i in new]
            sizes = [row.values_BPK.shape for row in logits]
            try:
                store.write([digests[i] for i in new], sizes, logits)
            except UserError as error:
                log.warning("teacher logits are kept for this run alone: %s", error)
        return found

    def _check_finite(self, name: str, split: str, ids_N: np.ndarray, found: list) -> None:
        spoilt = ids_N[[not np.isfinite(logits).all() for logits in found]]
        if len(spoilt):
            raise UserError(
                f"{name} {self._run.models[name].name}: its {_outputs(self._run)} of "
                f"{len(spoilt):,} of {len(found):,} rows of {split} are not finite (row "
                f"{spoilt[0]} is the first); {NOT_FINITE}"
            )

    def _open(self, name: str) -> LogitStore | None:
        gigabytes = cache_settings(self._run)["max_gb"]
        if "cache" not in self._run.config or not gigabytes:
            return None
        own = identity_of(self._run, name, self.given[name])
        return LogitStore(folder(self._run), own, gigabytes)


def teacher_and_batches(run: Run, this: Stage, logits: TeacherLogits) -> tuple[Teacher | None, Any]:
    """Returns the teacher of a stage, or None, and the stage's batches with the teacher's inputs.

    Teachers run in the step, or their logits are read from disk.
    """
    task, names = run.tasks[this.model], ", ".join(this.teachers)
    stream = task.train(this.batch_size, run.config.seed, **run.processes)
    if not this.learns:
        return None, stream
    found = stored_logits(run, this, logits)
    if found is None and not task.of_examples:
        return logits.model(this.teachers[0]), stream
    if found is None:
        states = this.program.objective.needs_teacher_states
        why = "the objective reads more than logits" if states else "cache.max_gb is 0"
        log.info("%s: %s at every step, since %s", this.name, names, why)
        return _online(run, this, logits, stream)
    log.info("%s: %s of %s, computed once for each row", this.name, _outputs(run), names)
    if task.of_examples:
        size = next(row.shape[-1] for row in found if row is not None)  # classes, or a vector's
        return Stored(size), stream.map(attach(found, run.head == "span", size))
    text, store = found
    teacher = text_logits.teacher(run, text.vocab_size)
    return teacher, stream.map(lambda batch: text.attach(batch, {TEACHER: store}))


def _outputs(run: Run) -> str:
    """Names what the models of a run compute of a row."""
    return "vectors" if run.task.outputs == "vector" else "logits"


def stored_logits(run: Run, this: Stage, logits: TeacherLogits) -> Any:
    """Returns the averaged logits of a stage's teachers for all training rows that it will see; for
    text, as (text, store) on disk. Computes missing ones. None if the stage has no teachers, or
    runs them in the step."""
    if not run.task.of_examples:
        if not text_logits.are_kept(run, this):
            return None
        make = _text
    elif not (this.learns and "cache" in run.config and cache_settings(run)["max_gb"]):
        return None
    elif this.program.objective.needs_teacher_states:
        return None
    else:
        make = _examples
    everywhere = bool(this.program.objective.everywhere)
    key = this.teachers, this.model, this.batch_size, this.steps, run.config.seed, everywhere
    return logits.once(key, functools.partial(make, run, this, logits))


def together(
    run: Run, this: Stage, logits: TeacherLogits, split: str, ids_N: np.ndarray | None = None
) -> list:
    """Averages the logits of a stage's teachers, row by row as `TeacherLogits.of`."""
    weights, space = run.weights(this.teachers), run.config.get("average", "logits")
    each = [logits.of(name, split, ids_N) for name in this.teachers]
    return [
        None if any(row is None for row in rows) else average(list(rows), weights, space, np)
        for rows in zip(*each, strict=True)
    ]


def _examples(run: Run, this: Stage, logits: TeacherLogits) -> list:
    stream, ids_N = run.tasks[this.model].train(this.batch_size, run.config.seed), None
    if this.steps < stream.steps_per_epoch:
        ids_N = np.concatenate([stream[step].ids_B for step in range(this.steps)])
        ids_N = ids_N[ids_N >= 0]
    return together(run, this, logits, "train", ids_N)


def _text(run: Run, this: Stage, logits: TeacherLogits) -> tuple[TextLogits, LogitStore]:
    stream = run.task.train(this.batch_size, run.config.seed, **run.processes)
    steps, k = text_logits.steps_of_new_rows(run, this), text_logits.top_k(run, this)
    drawn = text_logits.are_drawn(run)
    text = TextLogits(run, this, stream, steps, lambda tokens: k, drawn=drawn)
    return text, text.of(this.teachers[0], [logits.model(this.teachers[0])])


def fitted(run: Run, this: Stage, logits: TeacherLogits, state: TrainState) -> TrainState:
    """Fits the objective's own parameters of a first state to the vectors that the teachers compute
    of the stage's first texts, if a term has something to fit."""

    @functools.cache
    def vectors() -> np.ndarray:
        stream = run.tasks[this.model].train(this.batch_size, run.config.seed)
        batches = range(min(this.steps, -(-FITTED // this.batch_size)))
        ids_N = np.unique(np.concatenate([stream[batch].ids_B for batch in batches]))
        ids_N = ids_N[ids_N >= 0]
        found = together(run, this, logits, "train", ids_N)
        return np.stack([found[i] for i in ids_N])

    drawn = state.params["objective"]
    params = this.program.objective.fitted(drawn, vectors)
    specs = jax.tree.map(lambda leaf: leaf.sharding.spec, drawn)
    params = sharding.put(params, specs, run.mesh)
    return state.replace(params=state.params | {"objective": params})


def check(run: Run, this: Stage) -> None:
    """Raises UserError if a stage cannot learn from its teachers: all of their weights are 0, they
    read other tokens, their vectors have no mean, or a term needs more than stored logits."""
    if run.task.of_examples:
        if cache_settings(run)["logits"]:
            raise UserError("config.cache.logits is for language models; set config.cache.max_gb")
        run.weights(this.teachers)
        check_tokens(run, this)
        widths = [run.models[name].spec.vector_width for name in this.teachers]
        if run.head == "embedding" and len({*widths}) > 1:
            raise UserError(
                f"the vectors of {', '.join(this.teachers)} have {', '.join(map(str, widths))} "
                f"numbers, and only those of one width have a mean: leave some teachers out"
            )
    elif text_logits.are_kept(run, this):
        whose = "a teacher that is read from disk (config.cache.logits)"
        text_logits.check_terms(this.program.objective, whose)
        text_logits.check_kept(run, this.program.objective)


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


def attach(rows: list, spans: bool, size: int) -> Callable[[Batch], Batch]:
    """Gives each batch its rows' logits, as a teacher computed them before; padding of spans is
    MASKED."""

    def with_logits(batch: Batch) -> Batch:
        B, T = batch.tokens_BT.shape
        shape, padding = ((B, 2, T), MASKED) if spans else ((B, 1, size), 0.0)
        logits_BPC = np.full(shape, padding, np.float32)
        for logits_PC, i in zip(logits_BPC, batch.ids_B, strict=True):
            if i >= 0 and rows[i] is not None:
                logits_PC[:, : rows[i].shape[-1]] = rows[i]
        return batch.replace(stored={TEACHER: StoredLogits(logits_BPC)})

    return with_logits


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
    longest = [0 if aligned[name] else run.tasks[name].buckets[-1] for name in foreign]

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


def given_params(run: Run, name: str) -> Params:
    """Opens the parameters of a model that no stage trains, lazy tensors, or draws them at
    random."""
    model = run.models[name]
    key = jax.random.fold_in(jax.random.key(run.config.seed), 0)
    if model.folder is None:
        init = run.section(name).init
        log.warning("%s has random parameters: config.%s.init=%r", name, name, init)
        places = sharding.shardings(_specs(model.abstract().params, run.mesh), run.mesh)
        return jax.jit(model.draw, out_shardings=places)(key)
    return model.load(key)


def given_teachers(run: Run) -> dict[str, Params]:
    """Opens the parameters of the teachers that no stage trains, by name."""
    return {name: given_params(run, name) for name in run.teachers if name not in run.trained}


def frozen(run: Run, name: str, params: Params) -> Model:
    """Makes a teacher: a model's parameters as `Blueprint.freeze` prepares them, on the mesh."""
    model = run.models[name]
    return laid_out(model.frozen().replace(params=model.freeze(params)), run.mesh)


def on_mesh(run: Run, name: str, params: Params) -> Model:
    """Makes a model of parameters, which may lie anywhere, and lays it out on the mesh."""
    model = run.models[name]
    return laid_out(model.abstract().replace(params=model.padded(params)), run.mesh)


def laid_out(model: Model, mesh: Mesh) -> Model:
    """Puts a model's parameters, from files, the host or any devices, on a mesh."""
    return model.replace(params=sharding.put(model.params, _specs(model.params, mesh), mesh))


def _specs(params: Params, mesh: Mesh) -> Params:
    return sharding.param_specs(family.PARTITION, params, mesh)
