"""Defines a stage of a run: one model trained once, in one or more phases.

A kind of stage is a module kd_jax/stages/KIND.py with `make(run, name, settings) -> Stage`; kinds
differ only in the fields of `Stage`. Nothing here or in kd_jax/recipes knows any kind.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
from etils import epath
from flax import nnx

from kd_jax.errors import UserError
from kd_jax.models import family, surgery
from kd_jax.models.blueprint import Blueprint
from kd_jax.objectives.objective import build_objective
from kd_jax.run import text_logits
from kd_jax.run.models import check_terms
from kd_jax.run.settings import Settings
from kd_jax.schedules import learning_rate
from kd_jax.train import loop, optim, sharding, state, step
from kd_jax.train.checkpoint import Checkpoints
from kd_jax.train.records import Listener
from kd_jax.train.state import TrainState
from kd_jax.types import Array, Batch, Counted, Model, Params

if TYPE_CHECKING:
    from kd_jax.run.own_text import OwnText
    from kd_jax.run.run import Run
    from kd_jax.run.teaching import TeacherLogits

Parameters = dict[str, Params]  # by model of the run, of those that are there; perhaps abstract
Groups = Sequence[tuple[str, optim.Group]]


@dataclasses.dataclass(frozen=True)
class Phase:
    """A phase of a stage: the steps (start, end], in which the model keeps its shape.

    The phases of a stage share one directory: a checkpoint's step determines its phase. A phase
    ends with a checkpoint, and the next one's first state is a function of that checkpoint alone,
    so a run that was killed in between makes the same state again, bit for bit.
    """

    start: int
    end: int
    abstract: Callable[[], TrainState]  # describes the shapes of its state
    # Makes its first state of the last one of the phase before, None for none.
    enter: Callable[[TrainState | None], TrainState]
    check: Callable[[], Any]  # finds, without any array, what `enter` would fail of


class StepInputs(NamedTuple):
    """The shapes of a step's arguments: teacher and batch; and the models whose FLOPs count."""

    teacher: step.Teacher
    batch: Batch
    computing: list[Counted]  # the models that compute in the step, without the student


def with_teacher(run: Run, stage: Stage) -> StepInputs:
    """Describes the inputs of a step with the run's teacher, or with its stored logits."""
    batch = run.tasks[stage.model].shapes(stage.batch_size)
    if text_logits.are_kept(run, stage):
        return StepInputs(*text_logits.described(run, stage, batch), [])
    model = run.models["teacher"]
    computing = [model.counted()] if stage.learns else []
    return StepInputs(model.frozen(), batch, computing)


def last_phase(
    run: Run, stage: Stage, enter: Callable, start: int = 0, check: Callable | None = None
) -> Phase:
    """Makes the last, or only, phase of a stage; see `Phase` for `enter` and `check`."""
    shapes = functools.partial(abstract_state, run, stage)
    return Phase(start, stage.steps, shapes, enter, check or shapes)


def whole(run: Run, stage: Stage, parameters: Parameters) -> list[Phase]:
    """Makes the single phase of a stage that starts from `initial_params`."""
    create = functools.partial(create_state, run, stage, parameters)
    return [last_phase(run, stage, lambda _: create(), check=lambda: create(abstract=True))]


@dataclasses.dataclass(frozen=True)
class Writing:
    """How a stage's model writes what it learns from: see kd_jax/run/rollout.py."""

    writer: Callable[[Run, Stage], loop.Writer]
    lowered: Callable[[Run, Stage], jax.stages.Lowered]  # the program that writes, to be compiled
    flops: int  # of writing a batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage(Settings):
    """A stage, ready to be trained: its settings, objective and optimizer."""

    teachers: tuple[str, ...]  # models that it learns from; hidden states are those of the first
    learns: bool  # from its teachers; otherwise from labels alone, and is compared with them
    program: step.Program  # the static part of its step, with its objective
    schedules: loop.Schedules
    resume: str  # RUN/STAGE whose last checkpoint it goes on from; "": none
    recipe: str = "distil"  # that trains it
    principal: bool = False  # what the run is about, although other stages come later
    made: str = ""  # how its model is made of the teacher, up to the text, for its model card
    groups: Groups = ()  # parameters of its last state that have Adam counts of their own
    phases_of: Callable[[Run, Stage, Parameters], Sequence[Phase]] = whole
    step_inputs: Callable[[Run, Stage], StepInputs] = with_teacher
    # Makes what it learns from: its teacher, or None, and its batches; None: as the run has them.
    batches_of: Callable[[Run, Stage, TeacherLogits], tuple[step.Teacher | None, Any]] | None = None
    # Finds out what its model depends on, before it begins; the run's stages are made anew then.
    measure_first: Callable[[Parameters], None] | None = None
    writing: Writing | None = None  # of what it learns from, where the model writes it itself
    prompt_tokens: int = 0  # at most, of the training prompts that are written after; 0: none are
    # Measures what the model writes by itself; the last argument is the teacher.
    own_text: Callable[[Run, Stage, Model], OwnText] | None = None
    reports_start: str = ""  # the name by which the model that it starts from is reported as well
    # Steps and FLOPs of training besides its steps.
    more_training: Mapping[str, int] = dataclasses.field(default_factory=dict)
    swaps: Sequence[Mapping[str, Any]] = ()  # what happens to its model on the way, for people

    def phases(self, run: Run, parameters: Parameters) -> Sequence[Phase]:
        """Lists the phases of the stage's training."""
        return self.phases_of(run, self, parameters)


def make(
    run: Run,
    settings: Settings,
    table: sharding.Table = family.PARTITION,
    replacement: loop.Replacement | None = None,
    **fields: Any,
) -> Stage:
    """Makes a stage from its settings, and builds its objective. `table`: sharding of parameters;
    `replacement`: random replacement of blocks; `fields`: further fields, set by its kind."""
    learns = fields.setdefault("learns", bool(settings.objective))
    objective, coefficients, temperatures = build_objective(
        run.config[settings.objective] if learns else run.task.labels_only,
        settings.steps,
        run.policy,
        run.policy if learns else None,
        run.chunk,
        run.task.outputs,
    )
    check_terms(objective, settings.objective, run.mesh.shape["model"], run.task)
    rate, seed = learning_rate(settings.optim, settings.steps), run.config.seed
    # config.resume is for the last stage that distils the student.
    students = [each.name for each in run.settings if each.model == "student" and each.objective]
    usual = dict(
        teachers=run.teachers,
        program=step.Program(objective, run.mesh, table, run.config.accumulate),
        schedules=loop.Schedules(rate, coefficients, temperatures, seed, replacement),
        resume=run.config.resume if settings.name in students[-1:] else "",
    )
    return Stage(**(vars(settings) | usual | fields))


def initial_params(run: Run, stage: Stage, parameters: Parameters, key: Array):
    """Returns (init, inputs) that make a stage's first parameters, by its setting `init`."""
    model, section = run.models[stage.model], run.section(stage.model)
    if stage.after:
        return (lambda params: params), parameters[stage.model]
    init = section.init or ("model" if model.folder else "scratch")
    if init == "teacher":
        source = run.models["teacher"]

        def from_teacher(inputs):
            params, key = inputs
            whole = source.abstract().replace(params=params)
            return surgery.from_teacher(model.with_drawn_head(key), whole, section.layers).params

        return from_teacher, (parameters["teacher"], key)
    if init == "model":
        if model.folder is None:
            raise UserError(
                f"config.{stage.model}.init='model': set {stage.model}.model to a checkpoint"
            )
        return (lambda params: params), model.load(key)
    return model.draw, key


def create_state(run: Run, stage: Stage, params: Parameters, abstract: bool = False) -> TrainState:
    """Makes a stage's state before its first step, after all checks; or only its shapes."""
    key = jax.random.fold_in(jax.random.key(run.config.seed), 0)
    init, inputs = initial_params(run, stage, params, key)
    if abstract:
        inputs = jax.eval_shape(lambda x: x, inputs)
    return first_state(run, stage, inputs, init)


def first_state(
    run: Run,
    stage: Stage,
    inputs: Any,
    init: Callable[[Any], Params] = lambda params: params,
    *,
    model: Blueprint | None = None,
    groups: Groups | None = None,
    graphdef: nnx.GraphDef | None = None,
) -> TrainState:
    """Makes a state at step 0 with the parameters `init(inputs)`; abstract if `inputs` are.
    `model`, `groups` and `graphdef`: if they differ from those at the end of the stage."""
    model = model or run.models[stage.model]
    key = jax.random.fold_in(jax.random.key(run.config.seed), 1)
    objective, teacher = stage.program.objective, run.models[stage.teachers[0]]

    def both(inputs):
        terms = objective.init(key, model.spec, teacher.spec)
        return {"student": model.padded(init(inputs)), "objective": terms}

    groups = stage.groups if groups is None else groups
    make_optimizer = functools.partial(optim.make_optimizer, stage.optim, groups=groups)
    graphdef = graphdef or model.abstract().graphdef
    return state.create(both, inputs, graphdef, make_optimizer, stage.program.table, run.mesh)


def abstract_state(run: Run, stage: Stage) -> TrainState:
    """Describes a stage's last state by shapes and types; loads no parameters."""
    return first_state(run, stage, run.models[stage.model].abstract().params)


def restore_best(run: Run, stage: Stage) -> Params:
    """Reads the parameters of a stage's best checkpoint, without the optimizer's state."""
    checkpoints = Checkpoints(run.folder / stage.name / "checkpoints", keep=None)
    if checkpoints.best is None:
        raise UserError(f"{checkpoints.directory}: no checkpoint; run the run's command again")
    like = abstract_state(run, stage).replace(opt_state=())
    restored = checkpoints.restore(checkpoints.best, like)
    checkpoints.close()
    return run.models[stage.model].cut(restored.params["student"])


def train(
    run: Run,
    stage: Stage,
    phases: Sequence[Phase],
    *,
    stream: Any,
    teacher: step.Teacher | None,
    validate: Callable[[Model], dict[str, float]] | None,
    selection: loop.Selection,
    directory: epath.Path,
    listeners: Sequence[Listener] = (),
    writer: loop.Writer | None = None,
    samples: Callable[[], Sequence[dict[str, Any]]] | None = None,
) -> loop.Fit:
    """Trains a stage through all of its phases, from its latest checkpoint if there is one.

    Only checkpoints of the last phase are candidates for the best one, by `selection`. The other
    arguments are those of `loop.fit`.
    """
    config = run.config
    # Where config.eval.every is 0, once an epoch.
    every = config.eval.every or max(1, round(stage.steps / max(1.0, stage.epochs)))
    with contextlib.closing(
        Checkpoints(directory / "checkpoints", config.checkpoint.keep)
    ) as checkpoints:
        latest = checkpoints.latest or 0
    state = None
    for number, phase in enumerate(phases, 1):
        last = number == len(phases)
        if latest > phase.end and not last:
            continue
        state = phase.abstract() if latest > phase.start else phase.enter(state)
        fitted = loop.fit(
            state,
            stage=stage.name if len(phases) == 1 else f"{stage.name} {number}/{len(phases)}",
            program=stage.program,
            stream=stream,
            teacher=teacher,
            schedules=stage.schedules,
            steps=phase.end,
            validate=validate,
            intervals=loop.Intervals(
                every, config.checkpoint.get("every", every), config.log.every
            ),
            keep=config.checkpoint.keep,
            directory=directory,
            selection=selection if last else None,
            resume=stage.resume,
            listeners=listeners,
            begin=phase.start,
            writer=writer,
            samples=samples,
        )
        state = fitted.state
    return fitted
