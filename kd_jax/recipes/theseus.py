"""The stage `theseus`: blocks of the teacher are replaced at random, more and more of the time.

Xu et al. 2020, "BERT-of-Theseus" (arXiv:2002.02925). At every step each group of teacher blocks,
which do not change, is replaced by its successor with a probability; afterwards the successors are
trained alone. config.theseus:

    group   blocks of the teacher to a successor, which is a block of the same kind; 0, in the
            recipe `substitute`: the blocks that config.substitution replaces, each to its compact
            one
    layers  which blocks of the teacher the successors of groups begin as: uniform | first (the
            paper's) | last | a list
    rate    the probability: a number, or a schedule such as the paper's min(k t + b, 1),
            {kind: linear, start: b, end: 1, steps: (1 - b) / k}; steps are the replacement's own
            where they are left out
    steps   of replacement, or a share of the stage below 1

The paper trains successors alone: set optim.learning_rate_multipliers to freeze what else there is.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from kd_jax.errors import UserError
from kd_jax.models import compact, family, replacement, surgery
from kd_jax.models.blueprint import Blueprint
from kd_jax.models.replacement import joined
from kd_jax.objectives.pairwise import Pairwise
from kd_jax.ranges import Real
from kd_jax.recipes import stage
from kd_jax.recipes.phases import at_once
from kd_jax.recipes.stage import Groups, Stage
from kd_jax.schedules import value_schedule
from kd_jax.train import loop, optim, state
from kd_jax.train.optim import Group
from kd_jax.train.state import TrainState
from kd_jax.types import Array, Model, Params


def successor(settings: Any, teacher: Blueprint, remat: bool) -> Blueprint:
    """The model that is left in the end, where a successor replaces a group. Raises UserError where
    groups do not divide the layers."""
    if not settings.group:
        raise UserError("config.theseus.group=0: here it has to be 1 at least")
    layers = teacher.config.num_layers
    if layers % settings.group:
        raise UserError(
            f"config.theseus.group={settings.group} does not divide the {layers} blocks of the "
            f"teacher {teacher.name}"
        )
    count = layers // settings.group
    own = dataclasses.replace(teacher.config, num_layers=count, remat=remat)
    name = f"{teacher.name}, {settings.group} blocks in one"
    return dataclasses.replace(teacher, name=name, config=own, folder=None, commit=None)


def groups(setup: Any, this: Stage) -> Groups:
    """Compact successors have a learning rate of their own."""
    rows = [(".*", Group("others"))]
    if setup.config.theseus.group:
        return rows
    settings = setup.config.substitution
    factor = settings.learning_rate / this.optim.learning_rate
    compact_ones = at_once(setup.phases).pattern
    return [(compact_ones, Group("successors", factor, settings.warmup)), *rows]


def draws(setup: Any, this: Stage) -> loop.Replacement:
    """What is drawn at every step of the stage."""
    end, rate = _end(setup, this), setup.config.theseus.rate
    schedule = value_schedule(rate, end, "config.theseus.rate", Real(least=0, most=1))
    blocks = setup.models["theseus"].config.num_layers
    return loop.Replacement(lambda step: schedule(step) if step < end else 1.0, blocks)


def _end(setup: Any, this: Stage) -> int:
    """Steps of replacement."""
    steps = setup.config.theseus.steps
    end = round(steps * this.steps) if 0 < steps < 1 else int(steps)
    if not 0 < end < this.steps:
        raise UserError(
            f"config.theseus.steps={steps:g}: the stage has {this.steps} steps, the last of which "
            f"train the successors alone; set it between, or to a share of them below 1"
        )
    return end


@dataclasses.dataclass(frozen=True)
class Replacing:
    """The steps in which blocks are drawn (parts.Part)."""

    setup: Any
    stage: Stage
    given: Mapping[str, Params]

    start = 0

    @property
    def end(self) -> int:
        return _end(self.setup, self.stage)

    @property
    def _beside(self) -> tuple[tuple[int, ...], ...]:
        """For each block of the successor those of the teacher that it replaces."""
        size, count = (
            self.setup.config.theseus.group,
            self.setup.models["theseus"].config.num_layers,
        )
        if not size:
            births = self.setup.phases[-1].births
            return tuple((layer,) if birth else () for layer, birth in enumerate(births))
        return tuple(tuple(range(i * size, (i + 1) * size)) for i in range(count))

    def check(self) -> None:
        objective = self.setup.plan(self.stage)[0].objective
        for name, term in objective.state_terms:
            if isinstance(term, Pairwise):
                raise UserError(
                    f"objective.{name} compares attention, which the stage theseus has not while "
                    f"blocks are drawn; leave it out"
                )
        draws(self.setup, self.stage)
        jax.eval_shape(self._init, (self.given["teacher"], jax.random.key(0)))

    @functools.cached_property
    def _model(self) -> Model:
        new, old = (self.setup.models[name].abstract() for name in ("theseus", "teacher"))
        return joined(new, old, self._beside)

    def _init(self, inputs: tuple[Params, Array]) -> Params:
        """Parameters from the teacher's and a key; can be traced."""
        params, key = inputs
        setup, teacher, new = self.setup, *map(self.setup.models.get, ("teacher", "theseus"))
        whole = teacher.abstract().replace(params=params)
        if setup.config.theseus.group:
            fresh = new.abstract().replace(params=new.draw(key))
            ours = surgery.from_teacher(fresh, whole, setup.config.theseus.layers)
        else:
            phase, init = at_once(setup.phases), setup.config.substitution.init
            shape = phase.model.config.shape(phase.layers[0])
            how = phase.layers, shape, init, key
            ours, _ = compact.replace(whole, teacher.family, teacher.config, *how)
        return joined(ours, whole, self._beside).params

    def abstract(self) -> TrainState:
        return self._state(lambda params: params, self._model.params)

    def enter(self, before: TrainState | None) -> TrainState:
        key = jax.random.fold_in(jax.random.key(self.setup.config.seed), 0)
        return self._state(self._init, (self.given["teacher"], key))

    def _state(self, init: Any, inputs: Any) -> TrainState:
        frozen = ("/predecessors/", Group("predecessors", factor=0.0))
        rows = [frozen, *groups(self.setup, self.stage)]
        model, graphdef = self.setup.models["theseus"], self._model.graphdef
        return stage.state_of(self.setup, self.stage, model, rows, init, inputs, graphdef)


@dataclasses.dataclass(frozen=True)
class Alone:
    """The steps in which the successors are the model (parts.Part)."""

    setup: Any
    stage: Stage

    @property
    def start(self) -> int:
        return _end(self.setup, self.stage)

    @property
    def end(self) -> int:
        return self.stage.steps

    def check(self) -> None:
        self.abstract()

    def abstract(self) -> TrainState:
        return stage.abstract_state(self.setup, self.stage)

    def enter(self, before: TrainState | None) -> TrainState:
        graphdef: nnx.GraphDef = self.setup.models["theseus"].abstract().graphdef
        model = Model(replacement.successors(before.params["student"]), graphdef)
        make_optimizer = functools.partial(
            optim.make_optimizer, self.stage.optim, groups=groups(self.setup, self.stage)
        )
        return state.continued(before, model, make_optimizer, family.PARTITION, self.setup.mesh)
