"""Runs the rounds of a sequential ensemble: each trains a student, evaluates it and adds it."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from kd_jax.data.loader import Stream
from kd_jax.errors import UserError
from kd_jax.models import blueprint
from kd_jax.models.blueprint import count
from kd_jax.objectives.objective import held_out_objective
from kd_jax.run import cost, measure, stage
from kd_jax.run.measure import with_perplexity
from kd_jax.run.results import Compiling, kept, speed
from kd_jax.run.run import Run
from kd_jax.run.stage import Stage
from kd_jax.run.teacher_logits import frozen
from kd_jax.stages import mixing
from kd_jax.stages.round import batches, seed_of, text, vocab_size
from kd_jax.teachers import ensemble
from kd_jax.teachers.ensemble import OTHERS, TEACHER, EnsembleTeacher
from kd_jax.teachers.store import NOT_FINITE, LogitStore
from kd_jax.train import loop, sharding
from kd_jax.train.passes import evaluate
from kd_jax.train.records import Listener
from kd_jax.train.state import TrainState
from kd_jax.train.step import Program
from kd_jax.types import Model, Params

log = logging.getLogger(__name__)

Figures = dict[str, float]


class Rounds:
    """The rounds of an ensemble's run; each is trained, or continued, by `run`."""

    def __init__(self, run: Run, teacher: Params, listeners: Sequence[Listener]) -> None:
        self._run, self._listeners = run, listeners
        self._stage: Stage = run.principal
        self._teacher = frozen(run, "teacher", teacher)
        self._text = None if run.config.ensemble.fresh else text(run, self._stage)
        objective = held_out_objective(run.policy, run.policy, run.chunk, mixed=True)
        self._program = Program(objective, run.mesh, ensemble.PARTITION)
        self.of_teacher = self._evaluate_teacher(teacher)

    def run(self, number: int, members: Sequence[Params]) -> tuple[Params, dict[str, Any]]:
        """Trains a round, counted from 1, after `members`: returns the new member, and {"round",
        "members", "minutes", "pass_seconds" (before its first step), "pass_compile_seconds" (of
        those), "student": its metrics, "ensemble": those of all}."""
        run, this = self._run, self._stage
        folder = run.folder / f"round_{number}"
        began = time.time()
        with Compiling() as compiling:
            teacher, stream = self._taught(number, members)
        passed = time.time() - began
        online = self._online(members)
        schedules = dataclasses.replace(this.schedules, seed=seed_of(run, number))
        name = f"round {number}/{run.config.rounds}"
        this = dataclasses.replace(this, name=name, schedules=schedules, resume="")
        fitted = stage.train(
            run,
            this,
            [stage.last_phase(run, this, lambda _: self._start(members))],
            stream=stream,
            teacher=teacher,
            validate=functools.partial(self._evaluate, "validation", online),
            selection=loop.Selection("kl"),
            directory=folder,
            listeners=self._listeners,
        )
        params = fitted.state.params["student"]
        return params, kept(
            folder / "results.json",
            lambda: (
                self._figures(number, members, online, fitted)
                | {
                    "minutes": round((time.time() - began) / 60, 2),
                    "pass_seconds": round(passed, 2),
                    "pass_compile_seconds": round(compiling.seconds, 2),
                }
            ),
        )

    def _figures(
        self, number: int, members: Sequence[Params], online: EnsembleTeacher, fitted: loop.Fit
    ) -> dict[str, Any]:
        run, params = self._run, fitted.state.params["student"]
        figures = self._evaluate(run.split, online, fitted.state.student)
        own = {key: value for key, value in figures.items() if key.startswith("student_")}
        student = {key.removeprefix("student_"): value for key, value in own.items()}
        whole = {key: value for key, value in figures.items() if key not in own}
        size, space = count(params), run.config.ensemble.space
        alone = cost.measure_mean(run, "student", [params], space)
        whole |= cost.measure_mean(run, "student", [*members, params], space) if members else alone
        timing = speed(run.folder / f"round_{number}")
        return {
            "round": number,
            "members": len(members) + 1,
            "best_step": fitted.best_step,
            "student": with_perplexity(student) | {"parameters": size} | timing | alone,
            "ensemble": with_perplexity(whole) | {"parameters": size * (len(members) + 1)},
        }

    def weights(self, members: Sequence[Params]) -> tuple[list[float], Figures | None]:
        """Returns the members' final weights, and, if these are learned, the metrics of their mean;
        both are kept in the folder "learned"."""
        run = self._run
        if run.config.ensemble.weights == "equal" or len(members) == 1:
            return [1.0 / len(members)] * len(members), None

        def figures() -> dict[str, Any]:
            weights = mixing.learned(run, self._teacher, members)
            last = Model(members[-1], run.models["student"].abstract().graphdef)
            teacher = self._online(members[:-1], weights)
            found = self._evaluate(run.split, teacher, last)
            found = with_perplexity(
                {k: v for k, v in found.items() if not k.startswith("student_")}
            )
            return found | {"parameters": sum(map(count, members)), "weights": weights}

        found = kept(run.folder / "learned" / "results.json", figures)
        return found.pop("weights"), found

    def _start(self, members: Sequence[Params]) -> TrainState:
        run, this = self._run, self._stage
        if run.config.ensemble.start == "previous" and members:
            return stage.first_state(run, this, members[-1])
        return stage.create_state(run, this, {"teacher": self._teacher.params})

    @functools.cached_property
    def _logits_of_teacher(self) -> LogitStore:
        return self._text.of("teacher", [self._teacher])

    def _taught(self, number: int, members: Sequence[Params]) -> tuple[EnsembleTeacher, Stream]:
        """Makes the targets of a round (teacher and members), and its batches."""
        stream = batches(self._run, self._stage, number)
        logits, run = self._text, self._run
        if logits is None:
            return self._online(members), stream
        stores = {TEACHER: self._logits_of_teacher}
        params = {}
        if members:
            graphdef = run.models["student"].abstract().graphdef
            models = [Model(member, graphdef) for member in members]
            stores[OTHERS] = logits.of("student", models, [stores[TEACHER]])
            share = np.float32(1.0 / (len(members) + 1))
            params["share"] = sharding.everywhere(share, run.mesh)
        teacher = EnsembleTeacher(params, vocab_size(run), space=run.config.ensemble.space)
        return teacher, stream.map(lambda batch: logits.attach(batch, stores))

    def _online(
        self, members: Sequence[Params], weights: Sequence[float] | None = None
    ) -> EnsembleTeacher:
        """Makes the teacher that runs in the step with all members; `weights` are the members' and,
        last, the student's, by default equal."""
        run = self._run
        params: dict[str, Any] = {"teacher": self._teacher.params}
        if members:
            kept = [blueprint.stored(member, run.policy) for member in members]
            params["members"] = ensemble.stack(kept)
            weights = weights or [1.0] * (len(members) + 1)
            share = np.float32(weights[-1] / sum(weights))
            others = np.asarray(weights[:-1], np.float32)
            mixed = {"weights": others / others.sum(), "share": share}
            params |= sharding.everywhere(mixed, run.mesh)
        return EnsembleTeacher(
            params,
            vocab_size(run),
            self._teacher.graphdef,
            run.models["student"].stacked if members else None,
            run.config.ensemble.space,
        )

    def _evaluate(self, split: str, teacher: EnsembleTeacher, student: Model) -> Figures:
        """Computes held-out metrics of the mean, and of the student alone (student_loss, ...)."""
        run = self._run
        rows = run.config.eval.batch_size
        stream = run.task.held_out(split, rows, **run.processes)
        by = run.config.ensemble.eval_mean
        return evaluate(student, stream, teacher, self._program, by)

    def _evaluate_teacher(self, params: Params) -> Figures:
        run = self._run

        def figures() -> Figures:
            by = run.config.ensemble.eval_mean
            found = measure.of_text(run, self._teacher, None, by=by)
            if not math.isfinite(found["loss"]):
                raise UserError(
                    f"teacher {run.models['teacher'].name}: its loss on {run.split} text is "
                    f"{found['loss']}; {NOT_FINITE}"
                )
            own = {"parameters": count(params)}
            return (
                found | own | cost.measure_mean(run, "teacher", [params], run.config.ensemble.space)
            )

        return kept(run.folder / "teacher" / "results.json", figures)
