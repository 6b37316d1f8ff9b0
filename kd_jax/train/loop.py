"""THE training loop: every stage of every recipe is one call of `fit`."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from etils import epath

from kd_jax.errors import Diverged, UserError
from kd_jax.schedules import Schedule
from kd_jax.train import sharding
from kd_jax.train.checkpoint import Checkpoints
from kd_jax.train.preemption import Preempted, Preemption
from kd_jax.train.progress import ProgressBar
from kd_jax.train.records import Records
from kd_jax.train.sharding import place
from kd_jax.train.state import TrainState, abstract
from kd_jax.train.step import Inputs, Program, Teacher, teacher_is_finite, train_step
from kd_jax.types import Batch, Model


@dataclasses.dataclass(frozen=True)
class Replacement:
    """How often each of `blocks` blocks takes the place of its predecessors."""

    rate: Schedule
    blocks: int

    def at(self, seed: int, step: int) -> np.ndarray:
        """Draws independently, True with probability `rate`: a function of (seed, step)."""
        draws = np.random.default_rng([seed, step, self.blocks]).random(self.blocks)
        return draws < self.rate(step)


@dataclasses.dataclass(frozen=True)
class Schedules:
    """Everything that changes with the step, as functions of it."""

    learning_rate: Schedule
    weights: dict[str, Schedule]
    temperatures: dict[str, Schedule]
    seed: int
    replacement: Replacement | None = None

    def at(self, step: int) -> Inputs:
        """Computes the step's inputs; numbers in float32."""

        def values(schedules):
            return {name: np.float32(schedule(step)) for name, schedule in schedules.items()}

        seed = np.random.SeedSequence([self.seed, step]).generate_state(1)[0]
        rate = np.float32(self.learning_rate(step))
        drawn = None if self.replacement is None else self.replacement.at(self.seed, step)
        return Inputs(rate, values(self.weights), values(self.temperatures), seed, drawn)


@dataclasses.dataclass(frozen=True)
class Intervals:
    """Steps between evaluations, checkpoints and timing rows."""

    evaluate: int
    save: int
    log: int


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which held-out figure tells the best checkpoint, and when to stop waiting for a better one.

    Equal figures are decided by the lower loss.
    """

    figure: str = "loss"
    larger: bool = False  # whether larger is better
    patience: int = 0  # evaluations without a better one that end the stage; 0: none do

    def rank(self, figures: dict[str, float]) -> list[float]:
        """Ranks figures: smaller is better, compared from the left; what is not finite comes
        last."""
        sign = -1.0 if self.larger else 1.0
        rank = sign * figures[self.figure], figures["loss"]
        return [value if math.isfinite(value) else sys.float_info.max for value in rank]


class Clock:
    """Seconds of training, without evaluation and saving, and how long it waited for batches."""

    def __init__(self):
        self.restart()
        self.rate = 0.0

    def restart(self) -> None:
        """Forgets what was since the last row."""
        self._began = time.perf_counter()
        self.waited = self.steps = self.rows = self.tokens = 0

    def count(self, batch: Batch) -> None:
        """Counts a step on this process's rows, without padding and rows that fill a batch up."""
        processes = jax.process_count()
        self.steps += 1
        self.rows += processes * int((batch.ids_B >= 0).sum())
        self.tokens += processes * int(batch.mask_BT.sum())

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Leaves out what happens meanwhile."""
        began = time.perf_counter()
        yield
        self._began += time.perf_counter() - began

    def row(self, step: int) -> dict[str, float]:
        """Makes a row of the timing of the steps since the last one."""
        seconds = time.perf_counter() - self._began
        row = {
            "step": step,
            "seconds": round(seconds, 4),
            "tokens_per_second": round(self.tokens / seconds, 1),
            "rows_per_second": round(self.rows / seconds, 2),
            "input_wait_fraction": round(self.waited / seconds, 5),
        }
        self.rate = row["tokens_per_second"]
        self.restart()
        return row


@dataclasses.dataclass(frozen=True)
class Fit:
    """What `fit` leaves: the best state of those it saved, without the optimizer's where it is not
    the last one, and after how many steps it ended."""

    state: TrainState
    best_step: int
    steps: int


def resume_from(directory: str, steps: int) -> Checkpoints:
    """Opens the checkpoints of another stage directory, to go on from the last one.

    Raises UserError where there is none, or only one beyond this stage's `steps`.
    """
    source = Checkpoints(epath.Path(directory) / "checkpoints", keep=None)
    if source.latest is None:
        raise UserError(f"config.resume={directory}: no checkpoint there; give RUN/STAGE")
    if source.latest > steps:
        raise UserError(
            f"config.resume={directory} is at step {source.latest}, beyond the {steps} of this "
            f"stage; raise config.steps"
        )
    return source


def _metrics_row(step: int, metrics: dict[str, Any], inputs: Inputs, names: list[str]) -> dict:
    """One row of metrics.csv from the step's metrics (on the host)."""
    row = {"step": step, "loss": float(metrics["loss"])}
    for name in names:
        value = float(metrics["terms"][name].value())
        row[name] = value
        row[f"{name}_weighted"] = float(inputs.coefficients[name] * np.float32(value))
    for name in metrics["terms"]:
        row.setdefault(name, float(metrics["terms"][name].value()))
    row["learning_rate"] = float(inputs.learning_rate)
    if inputs.replaced_L is not None:
        row["replaced"] = float(np.mean(inputs.replaced_L))
    row["grad_norm"] = float(metrics["grad_norm"])
    return row


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
    wandb_run: Any = None,
    begin: int = 0,
) -> Fit:
    """Trains `state` until `steps` steps are done, from its latest checkpoint if there is one.

    A stage whose model changes on its way is one call of `fit` for each model, in one directory:
    `begin` is then the step at which the one before ended, whose last checkpoint lies there.

    Args:
        state: a new state, at step `begin`; replaced by the latest checkpoint in
            `directory`/checkpoints that is beyond it, and may be abstract where there is one.
        stage: the name shown.
        program: the static part of the step.
        stream: `stream.batches(step)` yields this process's rows from that step on.
        teacher: an argument of the step, never saved; None without distillation.
        schedules: the step's inputs.
        steps: the last step.
        validate: student -> held-out figures with "loss"; None: no selection.
        intervals: steps between evaluations, checkpoints, timing rows.
        keep: how many of the last checkpoints stay, besides the best one.
        directory: the stage's directory.
        selection: which of the checkpoints whose step was evaluated is the best. Its patience needs
            a checkpoint at every evaluation. None: no checkpoint is a candidate, and the last state
            is what the call leaves.
        resume: another stage directory to go on from where this one has no checkpoint yet.
        wandb_run: an open W&B run, or None.
        begin: the step of `state`.

    Raises Diverged on a loss that is not finite; Preempted after SIGTERM, when the state is saved.
    """
    checkpoints = Checkpoints(directory / "checkpoints", keep)
    records = bar = None
    with contextlib.ExitStack() as stack:
        stack.callback(checkpoints.close)  # whatever happens: it finishes a save in the background
        start = checkpoints.newest(state, begin)
        if start is not None:
            state = start
        elif resume:
            with contextlib.closing(resume_from(resume, steps)) as source:
                state = source.restore(source.latest, state)
        step, start = int(state.step), None if start is None else int(start.step)
        if jax.process_index() == 0:
            written = {} if start is None else checkpoints.note(start)
            records = Records(directory, step, wandb_run, written)
            bar = ProgressBar(stage, step, steps)
            stack.callback(records.close)
            stack.callback(bar.close)
        preemption = stack.enter_context(Preemption(program.mesh))
        clock, pending, compiled = Clock(), None, set()
        batches = None if step >= steps else stream.batches(step)

        def check_finite(loss: float, what: str, at: int, batch: Batch | None = None) -> None:
            if not math.isfinite(loss):
                checkpoints.wait()
                why = _likely_cause(at - begin, teacher, batch, program)
                raise Diverged(
                    f"{stage}: {what} is {loss} at step {at}: {why} (last checkpoint: "
                    f"{_at(checkpoints.latest)})"
                )

        def write_pending() -> None:
            """Writes the previous step's metrics; a loss that is not finite ends the run here."""
            nonlocal pending
            if pending is None:
                return
            done, metrics, inputs, batch = pending
            pending = None
            row = _metrics_row(done, jax.device_get(metrics), inputs, program.objective.names)
            if records is not None:
                records.add(records.metrics, "train", row)
            for name in ("loss", "grad_norm", "learning_rate"):
                check_finite(row[name], name, done, batch)
            if bar is not None:
                shown = {name: row[name] for name in ("loss", *program.objective.names)}
                bar.update(done, shown, clock.rate)

        # Do not change the order: what a checkpoint holds has been evaluated and written down,
        # and a batch is taken only after the save, so that a resumed run goes through the same.
        while True:
            leaving, last = preemption.requested(), step == steps
            # What was restored was evaluated and saved before; so was what a new model comes from.
            fresh = step not in (begin, start)
            planned = last or step % intervals.save == 0
            evaluating = validate and fresh and (last or step % intervals.evaluate == 0)
            saving = fresh and (planned or leaving)
            if evaluating or saving:
                write_pending()
            figures = None
            with clock.stopped():
                if evaluating:
                    figures = validate(state.student)
                    if records is not None:
                        records.add(records.evals, "eval", {"step": step, **figures})
                        bar.say(f"{stage} {step}/{steps}  held out: {_sentence(figures)}")
                    check_finite(figures["loss"], "held-out loss", step)
                if saving:
                    written = {} if records is None else records.sync()
                    # With figures, a save out of turn could become the best: without, a run that
                    # was interrupted chooses as one that was not.
                    ranked = selection is not None and figures is not None and planned
                    rank = selection.rank(figures) if ranked else None
                    checkpoints.save(state, rank, written)
            if leaving or last or _waited_enough(selection, intervals, checkpoints, step):
                break
            asked = time.perf_counter()
            batch = next(batches)
            clock.waited += time.perf_counter() - asked
            inputs = schedules.at(step)
            given = place(batch, program.mesh), teacher, sharding.everywhere(inputs, program.mesh)
            state, metrics = train_step(state, *given, program=program)
            step += 1
            clock.count(batch)
            write_pending()
            pending = (step, metrics, inputs, batch)
            if batch.tokens_BT.shape not in compiled:  # the first step on a shape compiles
                compiled.add(batch.tokens_BT.shape)
                write_pending()
                clock.restart()
            elif clock.steps == intervals.log:
                checkpoints.check()
                row = clock.row(step)
                if records is not None:
                    records.add(records.timing, "time", row)
        checkpoints.wait()
        if leaving or preemption.requested_now():
            if bar is not None:
                bar.say(f"{stage} {step}/{steps}  saved; the same command continues from here")
            raise Preempted
        best = step if selection is None else checkpoints.best
        if best != step:
            state = abstract(state)  # lets go of the last one's memory
            state = checkpoints.chosen(state)
    return Fit(state, best, step)


def _waited_enough(
    selection: Selection | None, intervals: Intervals, checkpoints: Checkpoints, step: int
) -> bool:
    """Whether the best checkpoint lies `patience` evaluations back. Known from the checkpoints
    alone, so that a run that was interrupted ends where one that was not does."""
    if selection is None or not selection.patience or step % intervals.evaluate:
        return False
    if checkpoints.best is None:
        return False
    return step - checkpoints.best >= selection.patience * intervals.evaluate


def _likely_cause(
    number: int, teacher: Teacher | None, batch: Batch | None, program: Program
) -> str:
    """Why a figure of update `number` is not finite, and what to do."""
    asked = teacher is not None and batch is not None
    if asked and not teacher_is_finite(teacher, place(batch, program.mesh), program=program):
        return (
            "the teacher's answers are not finite, so its weights are damaged or too large for "
            "config.precision; look at them, or take fp32"
        )
    known = "the teacher's answers are finite; " if asked else ""
    if number == 1:
        return (
            f"{known}nothing was updated before, so the parameters that the stage starts from are "
            f"not finite or too large for config.precision; look at them, or take fp32"
        )
    return f"{known}lower optim.learning_rate or set optim.clip_norm"


def _at(step: int | None) -> str:
    return "none yet" if step is None else f"step {step}"


def _sentence(figures: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
