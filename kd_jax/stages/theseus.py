"""Replaces blocks of the teacher at random, more and more of the time.

Xu et al. 2020, "BERT-of-Theseus" (arXiv:2002.02925). At every step each group of teacher blocks,
which do not change, is replaced by its successor with a probability; afterwards the successors are
trained alone. The paper's probability min(k t + b, 1) is config.theseus.rate = {kind: linear,
start: b, end: 1, steps: (1 - b) / k}; steps are those of the replacement where they are left out.

The paper trains successors alone: set optim.learning_rate_multipliers to freeze what else there is.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
from flax import nnx

from kd_jax.errors import UserError
from kd_jax.models import compact, family, replacement, surgery
from kd_jax.models.blueprint import Blueprint
from kd_jax.models.replacement import joined
from kd_jax.objectives.pairwise import Pairwise
from kd_jax.ranges import Real
from kd_jax.run import stage
from kd_jax.run.run import Run
from kd_jax.run.stage import Final, Given, Groups, Settings, Stage, state_of
from kd_jax.schedules import value_schedule
from kd_jax.stages import substitute, swaps
from kd_jax.stages.swaps import at_once
from kd_jax.train import loop, optim, state
from kd_jax.train.optim import Group
from kd_jax.train.state import TrainState
from kd_jax.types import Array, Model, Params

SECTION = "theseus"


def make(run: Run, name: str, settings: Settings) -> Stage:
    """The stage in which successors replace blocks of the teacher."""
    own, teacher, prepare = run.config.theseus, run.models["teacher"], None
    if own.group or substitute.SECTION not in run.config:
        new = successor(own, teacher, run.config.remat)
    else:
        swaps.check_decoder(teacher, f"config.theseus.group=0: teacher {teacher.name}")
        new, prepare = swaps.of(run)[-1].model, swaps.prepare(run, settings)
    run.add(name, new)
    end = _end(run, settings)
    return stage.make(
        run,
        settings,
        model=name,
        groups=_groups(run, settings),
        replacement=_draws(run, name, end),
        phases_of=lambda run, this, given: [
            Replacing(run, this, end, given),
            Final(run, this, functools.partial(_alone, run, this), start=end),
        ],
        prepare=prepare,
    )


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


def _groups(run: Run, this: Settings) -> Groups:
    """Compact successors have a learning rate of their own."""
    rows = [(".*", Group("others"))]
    if run.config.theseus.group:
        return rows
    settings = run.config.substitution
    factor = settings.learning_rate / this.optim.learning_rate
    compact_ones = at_once(swaps.of(run)).pattern
    return [(compact_ones, Group("successors", factor, settings.warmup)), *rows]


def _draws(run: Run, name: str, end: int) -> loop.Replacement:
    """What is drawn at every step of the stage."""
    rate = run.config.theseus.rate
    schedule = value_schedule(rate, end, "config.theseus.rate", Real(least=0, most=1))
    blocks = run.models[name].config.num_layers
    return loop.Replacement(lambda step: schedule(step) if step < end else 1.0, blocks)


def _end(run: Run, this: Settings) -> int:
    """Steps of replacement."""
    steps = run.config.theseus.steps
    end = round(steps * this.steps) if 0 < steps < 1 else int(steps)
    if not 0 < end < this.steps:
        raise UserError(
            f"config.theseus.steps={steps:g}: the stage has {this.steps} steps, the last of which "
            f"train the successors alone; set it between, or to a share of them below 1"
        )
    return end


@dataclasses.dataclass(frozen=True)
class Replacing:
    """The steps in which blocks are drawn, a phase."""

    run: Run
    stage: Stage
    end: int
    given: Given

    start = 0

    @property
    def _beside(self) -> tuple[tuple[int, ...], ...]:
        """For each block of the successor those of the teacher that it replaces."""
        size, count = self.run.config.theseus.group, self._new.config.num_layers
        if not size:
            births = swaps.of(self.run)[-1].births
            return tuple((layer,) if birth else () for layer, birth in enumerate(births))
        return tuple(tuple(range(i * size, (i + 1) * size)) for i in range(count))

    def check(self) -> None:
        for name, term in self.stage.program.objective.state_terms:
            if isinstance(term, Pairwise):
                raise UserError(
                    f"objective.{name} compares attention, which the stage theseus has not while "
                    f"blocks are drawn; leave it out"
                )
        jax.eval_shape(self._init, (self.given["teacher"], jax.random.key(0)))

    @property
    def _new(self) -> Blueprint:
        return self.run.models[self.stage.model]

    @functools.cached_property
    def _model(self) -> Model:
        old = self.run.models["teacher"].abstract()
        return joined(self._new.abstract(), old, self._beside)

    def _init(self, inputs: tuple[Params, Array]) -> Params:
        """Parameters from the teacher's and a key; can be traced."""
        params, key = inputs
        config, teacher, new = self.run.config, self.run.models["teacher"], self._new
        whole = teacher.abstract().replace(params=params)
        if config.theseus.group:
            fresh = new.abstract().replace(params=new.draw(key))
            ours = surgery.from_teacher(fresh, whole, config.theseus.layers)
        else:
            swap, init = at_once(swaps.of(self.run)), config.substitution.init
            shape = swap.model.config.shape(swap.layers[0])
            how = swap.layers, shape, init, key
            ours, _ = compact.replace(whole, teacher.family, teacher.config, *how)
        return joined(ours, whole, self._beside).params

    def abstract(self) -> TrainState:
        return self._state(lambda params: params, self._model.params)

    def enter(self, before: TrainState | None) -> TrainState:
        key = jax.random.fold_in(jax.random.key(self.run.config.seed), 0)
        return self._state(self._init, (self.given["teacher"], key))

    def _state(self, init: Any, inputs: Any) -> TrainState:
        frozen = ("/predecessors/", Group("predecessors", factor=0.0))
        rows = [frozen, *self.stage.groups]
        return state_of(self.run, self.stage, self._new, rows, init, inputs, self._model.graphdef)


def _alone(run: Run, this: Stage, before: TrainState) -> TrainState:
    """The state in which the successors are the model."""
    graphdef: nnx.GraphDef = run.models[this.model].abstract().graphdef
    model = Model(replacement.successors(before.params["student"]), graphdef)
    make_optimizer = functools.partial(optim.make_optimizer, this.optim, groups=this.groups)
    return state.continued(before, model, make_optimizer, family.PARTITION, run.mesh)
