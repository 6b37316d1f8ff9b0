"""A stage of a run: one model trained once, in one or more phases.

A kind of stage is a module kd_jax/stages/KIND.py with `make(run, name, settings) -> Stage`; what
differs between kinds are the fields of `Stage`. Nothing here or in kd_jax/recipes knows them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import jax
from clu import parameter_overview
from etils import epath
from flax import nnx
from ml_collections import ConfigDict

from kd_jax import config as defaults
from kd_jax import plugins
from kd_jax.errors import UserError
from kd_jax.models import family, surgery
from kd_jax.models.blueprint import Blueprint, count
from kd_jax.objectives import combine
from kd_jax.ranges import settings
from kd_jax.schedules import learning_rate
from kd_jax.train import loop, optim, state, step
from kd_jax.train.checkpoint import Checkpoints
from kd_jax.train.state import TrainState
from kd_jax.types import Array, Batch, Model, Params

if TYPE_CHECKING:
    from kd_jax.run.run import Run

log = logging.getLogger(__name__)

Given = Mapping[str, Params]  # parameters, perhaps abstract, of the models that are there, by name
Groups = Sequence[tuple[str, optim.Group]]


@dataclasses.dataclass(frozen=True)
class Settings:
    """config.stages.NAME with all defaults: those of the name (kd_jax/config.py), the run's own."""

    name: str
    kind: str
    model: str  # the section of the config that it trains; "" where the kind makes a model
    objective: str  # the key of the config with its terms; "": the labels alone
    after: str  # the stage that it goes on from, where config.stages has it
    select: bool  # its best checkpoint by held-out figures, or the last one
    steps: int
    batch_size: int
    optim: ConfigDict
    epochs: float = 0.0  # how many, where there are no steps
    own: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # the kind's SETTINGS

    @property
    def trains(self) -> str:
        """The name of the model that it trains."""
        return self.model or self.name


class Phase(Protocol):
    """The steps (start, end] of a stage, in which the model keeps its shape.

    The phases of a stage share one directory: a checkpoint's step tells its phase. A phase ends
    with a checkpoint, and the next one's first state is a function of that checkpoint alone, so a
    run that was killed between them makes it again, bit for bit.
    """

    start: int
    end: int

    def check(self) -> None:
        """Finds, without any array, what `enter` would fail of."""

    def abstract(self) -> TrainState:
        """Describes the shapes of its state."""

    def enter(self, before: TrainState | None) -> TrainState:
        """Makes its first state; `before` is the last one of the phase before, None for none."""


@dataclasses.dataclass(frozen=True)
class Final:
    """The last phase of a stage, or its only one: the model has the shape that it ends with."""

    run: Run
    stage: Stage
    enter: Callable[[TrainState | None], TrainState]
    start: int = 0
    try_out: Callable[[], Any] | None = None  # of `check`, where the shapes do not tell all

    @property
    def end(self) -> int:
        return self.stage.steps

    def check(self) -> None:
        (self.try_out or self.abstract)()

    def abstract(self) -> TrainState:
        return abstract_state(self.run, self.stage)


def whole(run: Run, stage: Stage, given: Given) -> Sequence[Phase]:
    """Trains a stage in one phase, from what `initial_params` says."""
    create = functools.partial(create_state, run, stage, given)
    return [Final(run, stage, lambda _: create(), try_out=lambda: create(abstract=True))]


@dataclasses.dataclass(frozen=True)
class Stage:
    """What a stage trains, on what, and how. The functions have defaults that most kinds share."""

    name: str
    model: str  # the name of the run's model that it trains
    teachers: tuple[str, ...]  # models that it learns from; hidden states are those of the first
    learns: bool  # from its teachers; otherwise from labels alone, and is compared with them
    steps: int
    epochs: float
    batch_size: int
    optim: ConfigDict
    program: step.Program  # the static part of its step, with its objective
    schedules: loop.Schedules
    after: str = ""  # the stage whose parameters it goes on with
    select: bool = True
    resume: str = ""  # RUN/STAGE whose last checkpoint it goes on from
    recipe: str = "distil"  # that trains it
    principal: bool = False  # what the run is about, although other stages come later
    made: str = ""  # how its model is made of the teacher, up to the text, for its model card
    groups: Groups = ()  # parameters of its last state that have Adam counts of their own
    phases_of: Callable[[Run, Stage, Given], Sequence[Phase]] = whole
    # Models worth figures that it starts from, by name.
    starts: Callable[[Given], Mapping[str, Params]] = lambda given: {}
    # Measures what its model depends on; the run's stages are made anew after it.
    prepare: Callable[[Given], None] | None = None
    # What answers in a step, and the batch as it is given, both abstract, from the teacher.
    beside: Callable[[Model, Batch], tuple[Any, Batch]] = lambda teacher, batch: (teacher, batch)
    # Abstract parameters of the models that answer in every step; None: those of `teacher`.
    answering: Callable[[], list[Params]] | None = None
    # Steps and FLOPs that its training takes besides the stage's steps.
    effort: Callable[[], Mapping[str, int]] = lambda: {}
    swaps: Sequence[Mapping[str, Any]] = ()  # what happens to its model on the way, for people

    def phases(self, run: Run, given: Given) -> Sequence[Phase]:
        """The phases of its training."""
        return self.phases_of(run, self, given)


def read(config: ConfigDict, teachers: Sequence[str]) -> list[Settings]:
    """Reads `config.stages`: first the stages whose names kd_jax/config.py knows, in its order,
    then the others. Raises UserError on unknown names, kinds and keys."""
    known = dict.fromkeys(teachers, {}) | defaults.STAGES
    known |= {name: {"model": name, "objective": ""} for name in teachers}
    have = {name: section for name, section in known.items() if _possible(config, section)}
    given = list(config.stages)
    if not given or [n for n in given if n not in have and "kind" not in config.stages[n]]:
        raise UserError(f"config.stages={given}: have {', '.join(have)}; of others give the kind")
    return [
        _settings(config, name, known.get(name, {}))
        for name in [*(n for n in known if n in given), *(n for n in given if n not in known)]
    ]


def _possible(config: ConfigDict, section: Mapping[str, Any]) -> bool:
    """Whether the config has the sections that a stage reads."""
    own = defaults.ranges(defaults.STAGE) | section
    named = [own["model"], own["objective"]]
    named.append(getattr(kind_of(own["kind"]), "SECTION", ""))
    return all(not name or name in config or name in config.get("teachers", {}) for name in named)


def kind_of(name: str) -> Any:
    """The module of a kind of stage."""
    return plugins.load("stages", name, "make")


def _settings(config: ConfigDict, name: str, of_name: Mapping[str, Any]) -> Settings:
    where = f"stages.{name}"
    given, usual = config.stages[name], defaults.ranges(defaults.STAGE) | of_name
    kind = given.get("kind", usual["kind"]) if hasattr(given, "get") else usual["kind"]
    of_run = defaults.ranges(defaults.table("", config))
    of_run = {key: of_run[key] for key in defaults.OF_RUN if key in of_run}
    of_kind = dict(getattr(kind_of(kind), "SETTINGS", {}))
    whole = settings(given, usual | of_run | of_kind, where)
    own = ConfigDict(config.optim.to_dict(), type_safe=False)
    own.update(whole["optim"])
    defaults.check_section(own, "optim", f"{where}.optim", config)
    whole |= {key: given.get(key, config[key]) for key in of_run} | {"optim": own}
    whole["own"] = {key: whole.pop(key) for key in of_kind if key in whole}
    section = whole["model"]
    if section and section not in config and section not in config.get("teachers", {}):
        raise UserError(f"config.{where}.model={section!r}: the config has no section {section!r}")
    if whole["objective"] and whole["objective"] not in config:
        raise UserError(f"config.{where}.objective={whole['objective']!r}: not in the config")
    return Settings(name, **whole)


def make(run: Run, settings: Settings, **fields: Any) -> Stage:
    """Makes a stage of these settings, whose objective is built here; `fields` are those of `Stage`
    in which its kind differs, and `replacement`, what it draws at every step besides dropout."""
    learns = fields.setdefault("learns", bool(settings.objective))
    terms = run.config[settings.objective] if learns else run.labels_only
    objective, knobs = combine.build(
        terms,
        settings.steps,
        run.policy,
        run.policy if learns else None,
        run.chunk,
        regression=run.task.regression,
        accuracy=run.task.of_examples,
    )
    table = fields.pop("table", family.PARTITION)
    program = step.Program(objective, run.mesh, table, run.config.accumulate)
    schedules = loop.Schedules(
        learning_rate(settings.optim, settings.steps),
        knobs.weights,
        knobs.temperatures,
        run.config.seed,
        fields.pop("replacement", None),
    )
    usual = dict(
        model=settings.trains,
        teachers=run.teachers,
        after=settings.after if any(s.name == settings.after for s in run.settings) else "",
        select=settings.select,
        resume=run.config.resume if settings.name == run.resumed else "",
    )
    return Stage(
        name=settings.name,
        steps=settings.steps,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        optim=settings.optim,
        program=program,
        schedules=schedules,
        **(usual | fields),
    )


def initial_params(run: Run, stage: Stage, given: Given, key: Array):
    """(init, inputs) of `state.create` for the model of a stage, by its section's `init`."""
    model, section = run.models[stage.model], run.section(stage.model)
    if stage.after:
        return (lambda params: params), given[stage.model]
    init = section.init or ("model" if model.folder else "scratch")
    if init == "teacher":
        source = run.models["teacher"]
        layers = section.layers

        def from_teacher(inputs):
            params, key = inputs
            whole = source.abstract().replace(params=params)
            fresh = model.abstract().replace(params=model.draw(key))
            return surgery.from_teacher(fresh, whole, layers).params

        return from_teacher, (given["teacher"], key)
    if init == "model":
        if model.folder is None:
            raise UserError(
                f"config.{stage.model}.init='model': set {stage.model}.model to a checkpoint"
            )
        return (lambda params: params), model.load(key)
    return model.draw, key


def create_state(run: Run, stage: Stage, given: Given, abstract: bool = False) -> TrainState:
    """The stage's state before its first step; or its shapes, after all checks."""
    key = jax.random.key(run.config.seed)
    init, inputs = initial_params(run, stage, given, jax.random.fold_in(key, 0))
    if abstract:
        inputs = jax.eval_shape(lambda x: x, inputs)
    return state_of(run, stage, run.models[stage.model], stage.groups, init, inputs)


def born(run: Run, stage: Stage, model: Blueprint, groups: Groups, params: Params) -> TrainState:
    """A state at step 0 of a model with these parameters; abstract where they are."""
    return state_of(run, stage, model, groups, lambda params: params, params)


def state_of(
    run: Run,
    stage: Stage,
    model: Blueprint,
    groups: Groups,
    init: Callable[[Any], Params],
    inputs: Any,
    graphdef: nnx.GraphDef | None = None,
) -> TrainState:
    """A state at step 0, of the parameters that `init` makes of `inputs`; abstract where they are.

    `graphdef`: where the parameters are of another structure than the model alone.
    """
    key = jax.random.fold_in(jax.random.key(run.config.seed), 1)
    objective, teacher = stage.program.objective, run.models[stage.teachers[0]]

    def both(inputs):
        own = objective.init(key, model.spec, teacher.spec)
        return {"student": init(inputs), "objective": own}

    make_optimizer = functools.partial(optim.make_optimizer, stage.optim, groups=groups)
    graphdef = graphdef or model.abstract().graphdef
    return state.create(both, inputs, graphdef, make_optimizer, stage.program.table, run.mesh)


def abstract_state(run: Run, stage: Stage) -> TrainState:
    """The shapes of a stage's last state, wherever its parameters come from."""
    model = run.models[stage.model]
    return born(run, stage, model, stage.groups, model.abstract().params)


def restore_best(run: Run, stage: Stage) -> Params:
    """The parameters of a stage's best checkpoint."""
    checkpoints = Checkpoints(run.folder / stage.name / "checkpoints", keep=None)
    if checkpoints.best is None:
        raise UserError(f"{checkpoints.directory}: no checkpoint; run the run's command again")
    restored = checkpoints.restore(checkpoints.best, abstract_state(run, stage))
    checkpoints.close()
    return restored.params["student"]


def train(
    phases: Sequence[Phase],
    *,
    stage: Stage,
    stream: Any,
    teacher: step.Teacher | None,
    validate: Callable[[Model], dict[str, float]] | None,
    selection: loop.Selection,
    intervals: loop.Intervals,
    keep: int,
    directory: epath.Path,
    wandb_run: Any = None,
) -> loop.Fit:
    """Trains a stage through all of its phases, from its latest checkpoint if there is one.

    Only checkpoints of the last phase are candidates for the best, by `selection`. The other
    arguments are those of `loop.fit`.
    """
    with contextlib.closing(Checkpoints(directory / "checkpoints", keep)) as checkpoints:
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
            intervals=intervals,
            keep=keep,
            directory=directory,
            selection=selection if last else None,
            resume=stage.resume,
            wandb_run=wandb_run,
            begin=phase.start,
        )
        state = fitted.state
    return fitted


def write_overview(stage: str, params: Params, path: epath.Path) -> None:
    """A table of all parameters to `path`, their number to the log."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(parameter_overview.get_parameter_overview(params, include_stats=False) + "\n")
    log.info("%s: %s parameters: %s", stage, f"{count(params):,}", path)
