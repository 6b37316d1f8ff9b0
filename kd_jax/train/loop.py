"""Defines the training loop: every stage of every recipe is trained by `fit`."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from etils import epath

from kd_jax.errors import Diverged
from kd_jax.schedules import Schedule
from kd_jax.train.checkpoint import Checkpoints, resume_from
from kd_jax.train.finite import likely_cause
from kd_jax.train.preemption import Preempted, Preemption
from kd_jax.train.progress import ProgressBar
from kd_jax.train.records import Clock, Listener, Records
from kd_jax.train.sharding import everywhere, place
from kd_jax.train.state import TrainState, abstract, settle
from kd_jax.train.step import Inputs, Program, Teacher, train_step
from kd_jax.types import Batch, Model


@dataclasses.dataclass(frozen=True)
class Replacement:
    """The random choice, at every step, of which new blocks replace the teacher's (Theseus)."""

    rate: Schedule
    blocks: int

    def at(self, seed: int, step: int) -> np.ndarray:
        """Draws a bool for each block, True with probability `rate`: a function of (seed, step)."""
        draws = np.random.default_rng([seed, step, self.blocks]).random(self.blocks)
        return draws < self.rate(step)


@dataclasses.dataclass(frozen=True)
class Schedules:
    """The schedules of a stage: everything that changes with the step, as functions of it."""

    learning_rate: Schedule
    coefficients: dict[str, Schedule]  # of the objective's terms
    temperatures: dict[str, Schedule]  # of the terms whose temperature is not constant
    seed: int
    replacement: Replacement | None = None

    def at(self, step: int) -> Inputs:
        """Computes the step's inputs; numbers in float32."""

        def values(schedules):
            return {name: np.float32(schedule(step)) for name, schedule in schedules.items()}

        seed = np.random.SeedSequence([self.seed, step]).generate_state(1)[0]
        rate = np.float32(self.learning_rate(step))
        drawn = None if self.replacement is None else self.replacement.at(self.seed, step)
        return Inputs(rate, values(self.coefficients), values(self.temperatures), seed, drawn)


@dataclasses.dataclass(frozen=True)
class Intervals:
    """The numbers of steps between evaluations, checkpoints and timing rows."""

    evaluate: int
    save: int
    log: int


class Writer(Protocol):
    """An object that writes, with the model that is trained, what it learns from."""

    every: int  # steps that learn from the same words: only between these a run may be interrupted

    def __call__(
        self, step: int, student: Model, batch: Batch, inputs: Inputs
    ) -> tuple[Batch, Inputs, bool]:
        """Returns what a step learns from, `batch` or one that the student wrote, its inputs, and
        whether the student wrote it."""

    def measured(self, batch: Batch, wrote: bool) -> dict[str, Any]:
        """Computes what metrics.csv has of a batch (on the mesh)."""


@dataclasses.dataclass(frozen=True)
class Selection:
    """The rule that selects the best checkpoint by a held-out metric, and stops training early.

    Ties are decided by the lower loss, where there is one.
    """

    figure: str = "loss"
    larger: bool = False  # whether larger is better
    patience: int = 0  # evaluations without a better one that end the stage; 0: none do

    def rank(self, figures: dict[str, float]) -> list[float]:
        """Converts metrics to a rank: a list that is compared from the left, smaller is better;
        values that are not finite come last."""
        sign = -1.0 if self.larger else 1.0
        rank = sign * figures[self.figure], figures.get("loss", 0.0)
        return [value if math.isfinite(value) else sys.float_info.max for value in rank]

    def gives_up(self, step: int, every: int, checkpoints: Checkpoints) -> bool:
        """Tells whether to stop: whether the best checkpoint lies `patience` evaluations back, with
        one evaluation `every` so many steps. Depends on checkpoints alone, so an interrupted run
        ends at the same step."""
        if not self.patience or step % every or checkpoints.best is None:
            return False
        return step - checkpoints.best >= self.patience * every


@dataclasses.dataclass(frozen=True)
class Fit:
    """The result of `fit`: the best saved state (without the optimizer's, unless it is the last),
    and the step at which training ended."""

    state: TrainState
    best_step: int
    steps: int


def _metrics_row(step: int, metrics: dict[str, Any], inputs: Inputs, names: list[str]) -> dict:
    """Makes a row of metrics.csv from the step's metrics (on the host)."""
    # In NumPy: on the device it would wait behind the step that is running.
    terms = {
        name: float(ratio.total / np.where(ratio.weight > 0, ratio.weight, np.float32(1.0)))
        for name, ratio in metrics["terms"].items()
    }
    row = {"step": step, "loss": float(metrics["loss"])}
    for name in names:
        row[name] = terms[name]
        row[f"{name}_weighted"] = float(inputs.coefficients[name] * np.float32(terms[name]))
    row |= terms | {"learning_rate": float(inputs.learning_rate)}
    if inputs.replaced_L is not None:
        row["replaced"] = float(np.mean(inputs.replaced_L))
    row |= {name: float(value) for name, value in metrics.get("written", {}).items()}
    return row | {"grad_norm": float(metrics["grad_norm"])}


def fit(
    state: TrainState,
    *,
    stage: str,
    program: Program,
    stream: Any,
    teacher: Teacher | None,
    schedules: Schedules,
    steps: int,
    validate: Callable[[Model], dict[str, float]] | None,
    intervals: Intervals,
    keep: int,
    directory: epath.Path,
    selection: Selection | None = Selection(),
    resume: str = "",
    listeners: Sequence[Listener] = (),
    begin: int = 0,
    writer: Writer | None = None,
    samples: Callable[[], Sequence[dict[str, Any]]] | None = None,
) -> Fit:
    """Trains `state` until `steps` steps are done, from its latest checkpoint if there is one.

    A stage whose model changes during training calls `fit` for each model, in one directory:
    `begin` is then the step at which the previous call ended, whose last checkpoint is there.

    Args:
        state: a new state, at step `begin`; replaced by the latest checkpoint beyond that step in
            `directory`/checkpoints; it may be abstract if there is one.
        stage: the name for messages.
        program: the static part of the step.
        stream: `stream.batches(step)` yields this process's rows from that step on.
        teacher: an argument of the step, never saved; None without distillation.
        schedules: the step's inputs.
        steps: the last step.
        validate: student -> held-out figures with "loss"; None: no selection.
        intervals: steps between evaluations, checkpoints, timing rows.
        keep: how many of the last checkpoints stay, besides the best one.
        directory: the stage's directory.
        selection: selects the best of the checkpoints whose step was evaluated. Its patience needs
            a checkpoint at every evaluation. None: the last state is returned.
        resume: another stage directory to continue from if this one has no checkpoint yet.
        listeners: called with every row that the first process writes.
        begin: the step of `state`.
        writer: writes batches with the student, where it learns from its own words.
        samples: returns texts that the last call of `validate` wrote, for samples.jsonl.

    Raises Diverged on a loss that is not finite; Preempted after SIGTERM, when the state is saved.
    """
    checkpoints = Checkpoints(directory / "checkpoints", keep)
    with contextlib.ExitStack() as stack:
        stack.callback(checkpoints.close)  # whatever happens: it finishes a save in the background
        start = checkpoints.newest(state, begin)
        if start is not None:
            state = start
        elif resume:
            with contextlib.closing(resume_from(resume, steps)) as source:
                state = source.restore(source.latest, state)
        step, start = int(state.step), None if start is None else int(start.step)
        written = {} if start is None else checkpoints.note(start)
        records = Records(directory, step, listeners, written, samples is not None)
        bar = ProgressBar(stage, step, steps, quiet=jax.process_index() > 0)
        stack.callback(records.close)
        stack.callback(bar.close)
        preemption = stack.enter_context(Preemption(program.mesh))
        clock, pending, compiled = Clock(writer is not None), None, set()
        batches = None if step >= steps else stream.batches(step)

        def check_finite(what: str, value: float, at: int, batch: Batch | None = None) -> None:
            if not math.isfinite(value):
                checkpoints.wait()
                why = likely_cause(at - begin, teacher, batch, program)
                saved = "none yet" if checkpoints.latest is None else f"step {checkpoints.latest}"
                raise Diverged(
                    f"{stage}: {what} is {value} at step {at}: {why} (last checkpoint: {saved})"
                )

        def write_pending() -> None:
            """Writes the previous step's metrics; raises Diverged if the loss is not finite."""
            nonlocal pending
            if pending is None:
                return
            done, metrics, inputs, batch = pending
            pending, names = None, program.objective.names
            row = _metrics_row(done, jax.device_get(metrics), inputs, names)
            records.add("metrics", row)
            for name in ("loss", "grad_norm", "learning_rate"):
                check_finite(name, row[name], done, batch)
            bar.update(done, {name: row[name] for name in ("loss", *names)}, clock.rate)

        # Do not change the order: what a checkpoint holds has been evaluated and written down,
        # and a batch is taken only after the save, so that a resumed run goes through the same.
        while True:
            last = step == steps
            leaving = preemption.requested() and (writer is None or step % writer.every == 0)
            # What was restored was evaluated and saved before; so was what a new model comes from.
            fresh = step not in (begin, start)
            planned = last or step % intervals.save == 0
            evaluating = validate and fresh and (last or step % intervals.evaluate == 0)
            saving = fresh and (planned or leaving)
            if evaluating or saving:
                write_pending()
            # A stage that ends early has a row of timing as well.
            if saving and (last or not clock.rate) and (row := clock.last_row(step)):
                records.add("timing", row)
            figures = None
            with clock.stopped():
                if evaluating:
                    figures = validate(state.student)
                    records.add("eval", {"step": step, **figures})
                    if samples is not None:
                        records.add_samples(step, samples())
                    found = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
                    bar.say(f"{stage} {step}/{steps}  held out: {found}")
                    first = "loss" if "loss" in figures else next(iter(figures))
                    check_finite(f"held-out {first}", figures[first], step)
                if saving:
                    # With figures, a save out of turn could become the best: without, a run that
                    # was interrupted chooses as one that was not.
                    ranked = selection is not None and figures is not None and planned
                    rank = selection.rank(figures) if ranked else None
                    checkpoints.save(state, rank, records.sync())
            if leaving or last:
                break
            if selection is not None and selection.gives_up(step, intervals.evaluate, checkpoints):
                break
            with clock.waiting():
                batch = next(batches)
            inputs, wrote = schedules.at(step), False
            if writer is not None:
                jax.block_until_ready(state)  # what is left of the last step is no writing
                with clock.written():
                    batch, inputs, wrote = writer(step, state.student, batch, inputs)
            new = batch.tokens_BT.shape not in compiled
            if new:
                bar.compiling(batch.tokens_BT.shape)
            given = place(batch, program.mesh), teacher, everywhere(inputs, program.mesh)
            state, metrics = train_step(settle(state), *given, program=program)
            if writer is not None:
                metrics["written"] = writer.measured(given[0], wrote)
            step += 1
            clock.count(batch)
            write_pending()
            pending = (step, metrics, inputs, batch)
            if new:  # the first step on a shape compiles
                compiled.add(batch.tokens_BT.shape)
                write_pending()
                clock.restart()
            elif clock.steps == intervals.log:
                checkpoints.check()
                records.add("timing", clock.row(step))
        checkpoints.wait()
        if leaving or preemption.requested_now():
            bar.say(f"{stage} {step}/{steps}  saved; the same command continues from here")
            raise Preempted
        best = step if selection is None else checkpoints.best
        if best != step:  # lets go of the last one's memory first
            state = abstract(state)
            state = checkpoints.chosen(state)
    return Fit(state, best, step)
