"""One round of a sequential ensemble, the stage that kd_jax/recipes/ensemble.py repeats: train a
student, measure it, let it join.

config.ensemble describes the members and their mean.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kd_jax.data.loader import Stream
from kd_jax.errors import UserError
from kd_jax.metrics import flops
from kd_jax.models.blueprint import count
from kd_jax.objectives.logits import head_of, in_chunks
from kd_jax.objectives.objective import held_out_objective
from kd_jax.precision import Policy
from kd_jax.run import measure, stage, text_logits
from kd_jax.run.measure import with_perplexity
from kd_jax.run.results import Compiling, kept, speed
from kd_jax.run.run import Run
from kd_jax.run.settings import Settings
from kd_jax.run.stage import Stage, StepInputs
from kd_jax.run.teaching import frozen
from kd_jax.run.text_logits import TextLogits, vocab_size
from kd_jax.teachers import ensemble
from kd_jax.teachers.ensemble import OTHERS, PARTITION, TEACHER, EnsembleTeacher
from kd_jax.teachers.store import NOT_FINITE, LogitStore
from kd_jax.train import loop, sharding
from kd_jax.train.passes import evaluate
from kd_jax.train.records import Listener
from kd_jax.train.state import TrainState
from kd_jax.train.step import Program
from kd_jax.types import Array, Batch, Model, Params

log = logging.getLogger(__name__)

SECTION = "ensemble"
STEPS, RATE, BATCHES = 100, 0.1, 8  # of Adam on weights; held-out batches that it sees
CHUNK = 256  # tokens whose logits exist at a time

Figures = dict[str, Any]


def make(run: Run, name: str, settings: Settings) -> Stage:
    """Makes the stage that every round of an ensemble goes through anew."""
    if run.head != "clm":
        raise UserError(
            f"config.task.name={run.config.task.name!r}: an ensemble is one of causal language "
            f"models; take clm or chat"
        )
    made = stage.make(run, settings, recipe="ensemble", table=PARTITION, step_inputs=_step_inputs)
    if text_logits.cache_settings(run)["logits"]:
        raise UserError(
            "config.cache.logits is for a single teacher; for an ensemble set config.ensemble.top_k"
        )
    text_logits.check_terms(made.program.objective, "the mean of an ensemble")
    return made


def _kept(run: Run, tokens: float) -> int:
    """Chooses how many logits of a token are stored: all if those of the teacher, a mean and the
    next mean fit on disk, else config.ensemble.top_k."""
    size, top_k = vocab_size(run, run.principal), run.config.ensemble.top_k
    whole = 3 * text_logits.size_of(tokens, size, size)
    fits = whole <= 1e9 * text_logits.cache_settings(run)["max_gb"]
    return size if fits else min(size, top_k)


def _train(run: Run) -> Stream:
    return run.task.train(run.principal.batch_size, run.config.seed, **run.processes)


def _rows_N(run: Run) -> np.ndarray:
    """Draws the rows that all rounds share, by the run's seed."""
    count = _train(run).size
    wanted = run.config.ensemble.rows or count
    if wanted > count:
        raise UserError(
            f"config.ensemble.rows={wanted}: the training text has {count} rows; lower it, or "
            f"set it to 0 for all of them"
        )
    order_N = np.random.default_rng([run.config.seed, count]).permutation(count)
    return np.sort(order_N[:wanted])


def training_flops(run: Run, this: Stage, past: int) -> int:
    """Counts the FLOPs of all rounds of an ensemble that has `past` members before them. Where the
    text is fixed: its steps, and one pass over the rows by the teacher and by each member but the
    last; otherwise teacher and members are in every step."""
    shape, rounds = measure.shape_of_step(run, this), run.config.rounds
    student, teacher = (run.models[name].counted() for name in ("student", "teacher"))
    if run.config.ensemble.fresh:
        others = ([teacher, *[student] * (past + number)] for number in range(rounds))
        return this.steps * sum(flops.train_step(student, each, {}, *shape) for each in others)
    total = rounds * this.steps * flops.train_step(student, [], {}, *shape)
    for model, passes in ((teacher, 1), (student, past + rounds - 1)):
        total += passes * flops.forward(model, len(_rows_N(run)), *shape[1:])
    return total


def _step_inputs(run: Run, this: Stage) -> StepInputs:
    """Describes a step of the last round."""
    n, settings, size = run.config.rounds - 1, run.config.ensemble, vocab_size(run, this)
    batch, shape = run.task.shapes(this.batch_size), jax.ShapeDtypeStruct
    params = {"share": shape((), np.float32)} if n else {}
    if settings.fresh:
        models = [run.models[name] for name in ("teacher", "student")]
        teacher, (whole, member) = models[0].frozen(), (each.counted() for each in models)
        params["teacher"] = teacher.params
        if n:
            stacked = jax.eval_shape(
                lambda: ensemble.stack(
                    n * [jax.tree.map(lambda x: jnp.zeros(x.shape), member.params)], run.policy
                )
            )
            params |= {"members": stacked, "weights": shape((n,), np.float32)}
        graphdef = models[1].of_members if n else None
        found = EnsembleTeacher(params, size, teacher.graphdef, graphdef, settings.space)
        return StepInputs(found, batch, [whole, *[member] * n])
    k = _kept(run, batch.tokens_BT.shape[1] * settings.rows or math.inf)
    logits, names = text_logits.abstract(batch.tokens_BT.shape, k, size), (TEACHER, OTHERS)
    batch = batch.replace(stored=dict.fromkeys(names if n else names[:1], logits))
    return StepInputs(EnsembleTeacher(params, size, space=settings.space), batch, [])


class Rounds:
    """The rounds of an ensemble's run; each is trained, or continued, by `run`."""

    def __init__(self, run: Run, teacher: Params, listeners: Sequence[Listener]) -> None:
        self._run, self._listeners = run, listeners
        self._stage, self._settings = run.principal, run.config.ensemble
        self._given, self._teacher = teacher, frozen(run, "teacher", teacher)
        self._member = run.models["student"].abstract().graphdef
        self._text = None if self._settings.fresh else self._read_text()
        objective = held_out_objective(run.policy, run.policy, run.chunk, mixed=True)
        self._held_out = Program(objective, run.mesh, PARTITION)
        path = run.folder / "teacher" / "results.json"
        self.of_teacher = kept(path, lambda: self._figures_of_teacher(teacher))

    def run(self, number: int, members: Sequence[Params]) -> tuple[Params, dict[str, Any]]:
        """Trains a round, counted from 1, after `members`: the new member, and {"round", "members",
        "minutes", "pass_seconds" (before its first step), "pass_compile_seconds" (of those),
        "student": its figures, "ensemble": those of all}."""
        run, this = self._run, self._stage
        folder = run.folder / f"round_{number}"
        # Of the order of the text and of dropout.
        seed = int(np.random.SeedSequence([run.config.seed, number]).generate_state(1)[0])
        began = time.time()
        with Compiling() as compiling:
            teacher, stream = self._teacher_and_batches(number, seed, members)
        passed = time.time() - began
        online = self._online(members)
        schedules = dataclasses.replace(this.schedules, seed=seed)
        name = f"round {number}/{run.config.rounds}"
        this = dataclasses.replace(this, name=name, schedules=schedules, resume="")
        fitted = stage.train(
            run,
            this,
            [stage.last_phase(run, this, lambda _: self._start(members))],
            stream=stream,
            teacher=teacher,
            validate=functools.partial(self._measured, "validation", online),
            selection=loop.Selection("kl"),
            directory=folder,
            listeners=self._listeners,
        )
        params = fitted.state.params["student"]

        def figures() -> Figures:
            student, mean = _apart(self._measured(run.split, online, fitted.state.student))
            size, whole = count(params), [*members, params]
            alone = self._timed("student", [params])
            mean |= self._timed("student", whole) if members else alone
            return {
                "round": number,
                "members": len(whole),
                "best_step": fitted.best_step,
                "student": student | {"parameters": size} | speed(folder) | alone,
                "ensemble": mean | {"parameters": size * len(whole)},
                "minutes": round((time.time() - began) / 60, 2),
                "pass_seconds": round(passed, 2),
                "pass_compile_seconds": round(compiling.seconds, 2),
            }

        return params, kept(folder / "results.json", figures)

    def weights(self, members: Sequence[Params]) -> tuple[list[float], Figures | None]:
        """Returns the members' weights in the end, and the figures of their mean where these were
        learned; kept in the folder "learned"."""
        run = self._run
        if self._settings.weights == "equal" or len(members) == 1:
            return [1.0 / len(members)] * len(members), None

        def figures() -> Figures:
            weights = learned_weights(run, self._teacher, members)
            teacher = self._online(members[:-1], weights)
            _, mean = _apart(self._measured(run.split, teacher, Model(members[-1], self._member)))
            return mean | {"parameters": sum(map(count, members)), "weights": weights}

        found = kept(run.folder / "learned" / "results.json", figures)
        return found.pop("weights"), found

    def _start(self, members: Sequence[Params]) -> TrainState:
        if self._settings.start == "previous" and members:
            return stage.first_state(self._run, self._stage, members[-1])
        return stage.create_state(self._run, self._stage, {"teacher": self._given})

    def _read_text(self) -> TextLogits:
        """Finds the logits of the rows that all rounds share."""
        run = self._run
        rows, k = _train(run).chosen(_rows_N(run)), functools.partial(_kept, run)
        return TextLogits(run, self._stage, rows, rows.steps, k, self._settings.space)

    @functools.cached_property
    def _logits_of_teacher(self) -> LogitStore:
        return self._text.of("teacher", [self._teacher])

    def _teacher_and_batches(
        self, number: int, seed: int, members: Sequence[Params]
    ) -> tuple[EnsembleTeacher, Stream]:
        """Returns what a round learns from, and its batches."""
        run, text = self._run, self._text
        if text is None:
            return self._online(members), _train(run).later((number - 1) * self._stage.steps)
        stores, params = {TEACHER: self._logits_of_teacher}, {}
        if members:
            models = [Model(member, self._member) for member in members]
            stores[OTHERS] = text.of("student", models, [stores[TEACHER]])
            share = np.float32(1.0 / (len(members) + 1))
            params["share"] = sharding.everywhere(share, run.mesh)
        teacher = EnsembleTeacher(params, text.vocab_size, space=self._settings.space)
        stream = _train(run).chosen(_rows_N(run), seed)
        return teacher, stream.map(lambda batch: text.attach(batch, stores))

    def _online(
        self, members: Sequence[Params], weights: Sequence[float] | None = None
    ) -> EnsembleTeacher:
        """Makes the teacher and all members in the step; `weights` are theirs and, last, the
        student's: equal ones by default."""
        run = self._run
        params: dict[str, Any] = {"teacher": self._teacher.params}
        if members:
            params["members"] = ensemble.stack(members, run.policy)
            weights = weights or [1.0] * (len(members) + 1)
            share = np.float32(weights[-1] / sum(weights))
            others = np.asarray(weights[:-1], np.float32)
            mixed = {"weights": others / others.sum(), "share": share}
            params |= sharding.everywhere(mixed, run.mesh)
        graphdefs = self._teacher.graphdef, run.models["student"].of_members if members else None
        size = vocab_size(run, self._stage)
        return EnsembleTeacher(params, size, *graphdefs, self._settings.space)

    def _measured(self, split: str, teacher: EnsembleTeacher, student: Model) -> Figures:
        """Computes held-out figures of the mean, and of the student in it, as student_loss and so
        on."""
        run = self._run
        stream = run.task.held_out(split, run.config.eval.batch_size, **run.processes)
        return evaluate(student, stream, teacher, self._held_out, self._settings.eval_mean)

    def _figures_of_teacher(self, params: Params) -> Figures:
        run = self._run
        found = measure.of_text(run, self._teacher, None, by=self._settings.eval_mean)
        if not math.isfinite(found["loss"]):
            raise UserError(
                f"teacher {run.models['teacher'].name}: its loss on {run.split} text is "
                f"{found['loss']}; {NOT_FINITE}"
            )
        return found | {"parameters": count(params)} | self._timed("teacher", [params])

    def _timed(self, name: str, members: Sequence[Params]) -> Figures:
        return measure.cost_of_mean(self._run, name, members, self._settings.space)


def _apart(figures: Figures) -> tuple[Figures, Figures]:
    """Splits metrics into those of the student alone and those of the ensemble's mean."""
    own = {key: value for key, value in figures.items() if key.startswith("student_")}
    mean = {key: value for key, value in figures.items() if key not in own}
    student = {key.removeprefix("student_"): value for key, value in own.items()}
    return with_perplexity(student), with_perplexity(mean)


def learned_weights(run: Run, teacher: Model, members: Sequence[Params]) -> list[float]:
    """Learns the members' weights, which sum to 1, by minimizing KL(teacher || mean) on the
    validation split, starting from equal weights. Runs on one device."""
    device = run.mesh.local_devices[0]
    stacked = ensemble.stack(map(sharding.to_host, members), run.policy)
    rows = run.task.held_out("validation", run.config.eval.batch_size)
    batches = [jax.device_put(rows[step], device) for step in range(min(rows.steps, BATCHES))]
    params, stacked = jax.device_put((sharding.to_host(teacher.params), stacked), device)
    models = Model(params, teacher.graphdef), stacked, run.models["student"].of_members
    how = dict(
        size=vocab_size(run, run.principal), space=run.config.ensemble.space, policy=run.policy
    )
    logits_E, optimizer = jnp.zeros(len(members)), optax.adam(RATE)
    state = optimizer.init(logits_E)
    for step in range(STEPS):
        slope_E = _slope(logits_E, *models, batches[step % len(batches)], **how)
        updates, state = optimizer.update(slope_E, state)
        logits_E = optax.apply_updates(logits_E, updates)
    weights = np.asarray(jax.nn.softmax(logits_E), np.float64)
    log.info("learned weights: %s", ", ".join(f"{weight:.3f}" for weight in weights))
    return weights.tolist()


@functools.partial(jax.jit, static_argnames=("graphdef", "size", "space", "policy"))
def _slope(
    logits_E: Array,
    teacher: Model,
    members: Params,
    graphdef: Any,
    batch: Batch,
    *,
    size: int,
    space: str,
    policy: Policy,
) -> Array:
    """Computes the gradient of a batch's mean KL with respect to the weights' logits, (E,)."""
    theirs = head_of(teacher(batch)).cut(size)
    weights_N = batch.weights.reshape(-1)

    def loss(logits_E):
        weights_E = jax.nn.softmax(logits_E)
        ours = ensemble.members(members, graphdef, weights_E, batch, space).cut(size)

        @jax.checkpoint
        def chunk(total, parts):
            own_rows, their_rows, weights_C = parts
            p_CV = jax.nn.log_softmax(theirs.logits(their_rows, policy), axis=1)
            q_CV = jax.nn.log_softmax(ours.logits(own_rows, policy), axis=1)
            kl_C = (jnp.exp(p_CV) * (p_CV - q_CV)).sum(axis=1)
            return total + jnp.where(weights_C > 0, kl_C, 0.0).sum(), None

        parts = in_chunks((ours.rows, theirs.rows, weights_N), CHUNK)
        total, _ = jax.lax.scan(chunk, jnp.float32(0.0), parts)
        return total / (weights_N > 0).sum()

    return jax.grad(loss)(logits_E)
