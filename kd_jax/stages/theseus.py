"""Replaces blocks of the teacher at random, with growing probability, by the student's blocks.

Xu et al. 2020, "BERT-of-Theseus" (arXiv:2002.02925). At every step each group of teacher blocks,
which are frozen, is replaced by its successor with a probability; afterwards the successors are
trained alone. The paper's probability min(k t + b, 1) is config.theseus.rate = {kind: linear,
start: b, end: 1, steps: (1 - b) / k}; `steps` defaults to the steps of replacement.

The paper trains only successors: set optim.learning_rate_multipliers to freeze everything else.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from kd_jax.errors import UserError
from kd_jax.models import compact, family, replacement, surgery
from kd_jax.models.blueprint import Blueprint
from kd_jax.models.replacement import joined
from kd_jax.objectives.pairwise import Pairwise
from kd_jax.ranges import Real
from kd_jax.run import models, stage
from kd_jax.run.run import Run
from kd_jax.run.settings import Settings
from kd_jax.run.stage import Groups, Parameters, Phase, Stage, first_state, last_phase
from kd_jax.run.teaching import on_mesh
from kd_jax.schedules import value_schedule
from kd_jax.stages import substitute, swaps
from kd_jax.stages.swaps import Swap, at_once
from kd_jax.train import loop, optim, state
from kd_jax.train.optim import Group
from kd_jax.train.state import TrainState
from kd_jax.types import Array, Model, Params

SECTION = "theseus"


def make(run: Run, name: str, settings: Settings) -> Stage:
    """Makes the stage in which successors replace blocks of the teacher at random."""
    own, teacher, swap, measure_first = run.config.theseus, run.models["teacher"], None, None
    groups: Groups = [(".*", Group("others"))]
    if own.group or substitute.SECTION not in run.config:
        new = successor(own, teacher, models.execution(run.config))
    else:
        swaps.check_blocks(teacher, f"config.theseus.group=0: teacher {teacher.name}")
        swap, measure_first = at_once(swaps.of(run)), swaps.measure_first(run, settings)
        new, compact_ones = swap.model, run.config.substitution
        factor = compact_ones.learning_rate / settings.optim.learning_rate
        groups = [(swap.pattern, Group("successors", factor, compact_ones.warmup)), *groups]
    run.add(name, new)
    end = _end(run, settings)
    return stage.make(
        run,
        settings,
        model=name,
        groups=groups,
        replacement=_replacement(run, name, end),
        phases_of=lambda run, this, parameters: [
            Replacing(run, this, end, parameters, swap).phase,
            last_phase(run, this, functools.partial(_alone, run, this), start=end),
        ],
        measure_first=measure_first,
    )


def successor(settings: Any, teacher: Blueprint, execution: dict[str, Any]) -> Blueprint:
    """Describes the final model, which has one successor for each group of the teacher's blocks.
    Raises UserError if the groups do not divide the layers."""
    if not settings.group:
        raise UserError("config.theseus.group=0: here it has to be 1 at least")
    layers = teacher.config.num_layers
    if layers % settings.group:
        raise UserError(
            f"config.theseus.group={settings.group} does not divide the {layers} blocks of the "
            f"teacher {teacher.name}"
        )
    count = layers // settings.group
    copied = surgery.layer_map(settings.layers, count, layers)
    own = dataclasses.replace(teacher.config.with_layers(copied), **execution)
    return teacher.changed(f"{teacher.name}, {settings.group} blocks in one", own)


def _replacement(run: Run, name: str, end: int) -> loop.Replacement:
    """Makes the schedule of the probability with which blocks are replaced in a step."""
    rate = run.config.theseus.rate
    schedule = value_schedule(rate, end, "config.theseus.rate", Real(least=0, most=1))
    blocks = run.models[name].config.num_layers
    return loop.Replacement(lambda step: schedule(step) if step < end else 1.0, blocks)


def _end(run: Run, this: Settings) -> int:
    """Computes the last step in which blocks are replaced at random."""
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
    """The steps in which blocks are replaced at random, the first phase of the stage."""

    run: Run
    stage: Stage
    end: int
    parameters: Parameters
    swap: Swap | None  # whose compact blocks are the successors; None: groups of whole ones

    @property
    def phase(self) -> Phase:
        """Makes the first phase of the stage."""
        return Phase(0, self.end, self._abstract, self._enter, self._check)

    @property
    def _replaced(self) -> tuple[tuple[int, ...], ...]:
        """Lists for each block of the successor the teacher's blocks that it replaces."""
        if self.swap is not None:
            births = enumerate(self.swap.births)
            return tuple((layer,) if birth else () for layer, birth in births)
        size, count = self.run.config.theseus.group, self._new.config.num_layers
        return tuple(tuple(range(i * size, (i + 1) * size)) for i in range(count))

    @property
    def _new(self) -> Blueprint:
        return self.run.models[self.stage.model]

    @functools.cached_property
    def _model(self) -> Model:
        old = self.run.models["teacher"].abstract()
        return joined(self._new.abstract(), old, self._replaced)

    def _check(self) -> None:
        for name, term in self.stage.program.objective.state_terms:
            if isinstance(term, Pairwise):
                raise UserError(
                    f"objective.{name} compares attention, which the stage theseus has not while "
                    f"blocks are drawn; leave it out"
                )
        jax.eval_shape(self._init, (self.parameters["teacher"], jax.random.key(0)))

    def _init(self, inputs: tuple[Params, Array]) -> Params:
        """Makes the stage's first parameters from the teacher's and a key; can be traced."""
        params, key = inputs
        config, new = self.run.config, self._new
        teacher = self.run.labelled(self.run.models["teacher"])
        whole = teacher.abstract().replace(params=params)
        if self.swap is None:
            ours = surgery.from_teacher(new.with_drawn_head(key), whole, config.theseus.layers)
        else:
            layers, init = self.swap.layers, config.substitution.init
            how = layers, self.swap.model.config.shape(layers[0]), init, key
            ours, _ = compact.replace(whole, teacher.family, teacher.config, *how)
        return joined(ours, whole, self._replaced).params

    def _first(self, inputs: Any, init: Callable[[Any], Params]) -> TrainState:
        frozen = ("/predecessors/", Group("predecessors", factor=0.0))
        groups, graphdef = [frozen, *self.stage.groups], self._model.graphdef
        return first_state(self.run, self.stage, inputs, init, groups=groups, graphdef=graphdef)

    def _abstract(self) -> TrainState:
        return self._first(self._model.params, lambda params: params)

    def _enter(self, before: TrainState | None) -> TrainState:
        key = jax.random.fold_in(jax.random.key(self.run.config.seed), 0)
        teacher = on_mesh(self.run, "teacher", self.run.original(self.parameters)).params
        return self._first((teacher, key), self._init)


def _alone(run: Run, this: Stage, before: TrainState) -> TrainState:
    """Makes the state after replacement, in which the successors alone are the model."""
    graphdef: nnx.GraphDef = run.models[this.model].abstract().graphdef
    model = Model(replacement.successors(before.params["student"]), graphdef)
    make_optimizer = functools.partial(optim.make_optimizer, this.optim, groups=this.groups)
    return state.continued(before, model, make_optimizer, family.PARTITION, run.mesh)
