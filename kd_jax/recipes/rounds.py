"""One round of a sequential ensemble after the other: train a student, judge it, let it join."""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kd_jax.data.loader import Stream
from kd_jax.errors import UserError
from kd_jax.recipes import blueprint, ensemble_cost, mixing, stage
from kd_jax.recipes.ensemble_setup import EnsembleSetup
from kd_jax.recipes.recall import Recall
from kd_jax.recipes.stage import Stage
from kd_jax.recipes.stopwatch import Compiling
from kd_jax.schedules import learning_rate
from kd_jax.teachers import ensemble
from kd_jax.teachers.ensemble import OTHERS, TEACHER, Guides
from kd_jax.teachers.signals import NOT_FINITE
from kd_jax.train import loop, sharding
from kd_jax.train.passes import evaluate
from kd_jax.train.state import TrainState
from kd_jax.types import Batch, Model, Params

log = logging.getLogger(__name__)

Figures = dict[str, float]


class Rounds:
    """Trains the rounds of a run, or what is left of them."""

    def __init__(self, setup: EnsembleSetup, teacher: Params, wandb_run: Any) -> None:
        self._setup, self._wandb = setup, wandb_run
        self._stage: Stage = setup.principal
        self._teacher = stage.frozen(setup, "teacher", teacher)
        self._recall = None
        if not setup.config.ensemble.fresh:
            once = setup.one_pass(self._stage.batch_size)
            self._recall = Recall(setup, self._teacher, *once)
        self.of_teacher = self._judged_teacher(teacher)

    def run(self, number: int, members: Sequence[Params]) -> tuple[Params, dict[str, Any]]:
        """A round, counted from 1, after `members`: the new member, and {"round", "members",
        "minutes", "pass_seconds" (before its first step), "pass_compile_seconds" (of those),
        "student": its figures, "ensemble": those of all}."""
        setup, this = self._setup, self._stage
        folder = setup.folder / f"round_{number}"
        began = time.time()
        plan, knobs = setup.plan(this)
        with Compiling() as compiling:
            guides, stream = self._taught(number, members)
        passed = time.time() - began
        online = self._online(members)
        fitted = loop.fit(
            self._start(members),
            stage=f"round {number}/{setup.config.rounds}",
            plan=plan,
            stream=stream,
            teacher=guides,
            schedules=loop.Schedules(
                learning_rate(this.optim, this.steps),
                knobs.weights,
                knobs.temperatures,
                setup.seed_of(number),
            ),
            steps=this.steps,
            validate=functools.partial(self._judged, "validation", online),
            intervals=loop.Intervals(
                setup.config.eval.every, setup.config.checkpoint.every, setup.config.log.every
            ),
            keep=setup.config.checkpoint.keep,
            directory=folder,
            selection=loop.Selection("kl"),
            wandb_run=self._wandb,
        )
        params = fitted.state.params["student"]
        return params, stage.kept(
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
        self, number: int, members: Sequence[Params], online: Guides, fitted: loop.Fit
    ) -> dict[str, Any]:
        setup, params = self._setup, fitted.state.params["student"]
        figures = self._judged(setup.reported, online, fitted.state.student)
        own = {key: value for key, value in figures.items() if key.startswith("student_")}
        student = {key.removeprefix("student_"): value for key, value in own.items()}
        whole = {key: value for key, value in figures.items() if key not in own}
        size = stage.count(params)
        alone = ensemble_cost.measure(setup, "student", [params])
        whole |= ensemble_cost.measure(setup, "student", [*members, params]) if members else alone
        speed = stage.speed(setup.folder / f"round_{number}")
        return {
            "round": number,
            "members": len(members) + 1,
            "best_step": fitted.best_step,
            "student": _perplexity(student) | {"parameters": size} | speed | alone,
            "ensemble": _perplexity(whole) | {"parameters": size * (len(members) + 1)},
        }

    def weights(self, members: Sequence[Params]) -> tuple[list[float], Figures | None]:
        """The members' weights in the end, and the figures of their mean where these were learned;
        kept in the folder "learned"."""
        setup = self._setup
        if setup.config.ensemble.weights == "equal" or len(members) == 1:
            return [1.0 / len(members)] * len(members), None

        def figures() -> dict[str, Any]:
            weights = mixing.learned(setup, self._teacher, members)
            last = Model(members[-1], setup.models["student"].abstract().graphdef)
            guides = self._online(members[:-1], weights)
            found = self._judged(setup.reported, guides, last)
            found = _perplexity({k: v for k, v in found.items() if not k.startswith("student_")})
            return found | {"parameters": sum(map(stage.count, members)), "weights": weights}

        found = stage.kept(setup.folder / "learned" / "results.json", figures)
        return found.pop("weights"), found

    def _start(self, members: Sequence[Params]) -> TrainState:
        setup, this = self._setup, self._stage
        if setup.config.ensemble.start == "previous" and members:
            model = setup.models[this.model]
            return stage.born(setup, this, model, setup.groups(this), members[-1])
        return stage.create_state(setup, this, self._given)

    @functools.cached_property
    def _given(self) -> Mapping[str, Params]:
        return {"teacher": self._teacher.params}

    def _taught(self, number: int, members: Sequence[Params]) -> tuple[Guides, Stream]:
        """What a round learns from, and its batches."""
        stream = self._setup.stream(self._stage, number)
        if self._recall is None:
            return self._online(members), stream
        known = {TEACHER: self._recall.teacher}
        params = {}
        if members:
            known[OTHERS] = self._recall.mean(members)
            share = np.float32(1.0 / (len(members) + 1))
            params["share"] = sharding.everywhere(share, self._setup.mesh)

        def attach(batch: Batch) -> Batch:
            return batch.replace(signals={name: each.of(batch) for name, each in known.items()})

        settings, size = self._setup.config.ensemble, self._setup.vocab_size
        return Guides(params, size, space=settings.space), stream.map(attach)

    def _online(self, members: Sequence[Params], weights: Sequence[float] | None = None) -> Guides:
        """The teacher and all members in the step; `weights` are theirs and, last, the student's:
        equal ones by default."""
        setup = self._setup
        params: dict[str, Any] = {"teacher": self._teacher.params}
        if members:
            kept = [blueprint.stored(member, setup.policy) for member in members]
            params["members"] = ensemble.stack(kept)
            weights = weights or [1.0] * (len(members) + 1)
            share = np.float32(weights[-1] / sum(weights))
            others = np.asarray(weights[:-1], np.float32)
            mixed = {"weights": others / others.sum(), "share": share}
            params |= sharding.everywhere(mixed, setup.mesh)
        return Guides(
            params,
            setup.vocab_size,
            self._teacher.graphdef,
            setup.models["student"].stacked if members else None,
            setup.config.ensemble.space,
        )

    def _judged(self, split: str, guides: Guides, student: Model) -> Figures:
        """Held-out figures of the mean, and of the student in it, as student_loss and so on."""
        setup = self._setup
        rows = setup.config.eval.batch_size
        stream = setup.task.held_out(split, rows, **setup.processes)
        by = setup.config.ensemble.eval_mean
        return evaluate(student, stream, guides, setup.judging_plan(), by)

    def _judged_teacher(self, params: Params) -> Figures:
        setup = self._setup

        def figures() -> Figures:
            rows, by = setup.config.eval.batch_size, setup.config.ensemble.eval_mean
            stream = setup.task.held_out(setup.reported, rows, **setup.processes)
            plan = setup.held_out_plan(beside_teacher=False)
            found = _perplexity(evaluate(self._teacher, stream, None, plan, by))
            if not math.isfinite(found["loss"]):
                raise UserError(
                    f"teacher {setup.models['teacher'].name}: its loss on {setup.reported} text is "
                    f"{found['loss']}; {NOT_FINITE}"
                )
            own = {"parameters": stage.count(params)}
            return found | own | ensemble_cost.measure(setup, "teacher", [params])

        return stage.kept(setup.folder / "teacher" / "results.json", figures)


def _perplexity(figures: Figures) -> Figures:
    perplexity = math.exp(min(figures["loss"], 700.0))
    return {"loss": figures["loss"], "perplexity": perplexity} | figures
