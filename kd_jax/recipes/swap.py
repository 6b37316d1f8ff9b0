"""The parts of a substitution: each begins with a swap, a function of the checkpoint before it."""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
from collections.abc import Mapping
from typing import Any

import jax

from kd_jax.errors import UserError
from kd_jax.models import compact, family
from kd_jax.recipes import stage
from kd_jax.recipes.fitting import fitted
from kd_jax.recipes.phases import Phase
from kd_jax.recipes.stage import Groups, Stage
from kd_jax.recipes.stopwatch import Compiling
from kd_jax.train import optim, sharding, state
from kd_jax.train.records import Table
from kd_jax.train.state import TrainState
from kd_jax.types import Array, Model, ModelSpec, Params

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Substituted:
    """A phase as a part of its stage (parts.Part)."""

    setup: Any
    stage: Stage
    phase: Phase
    given: Mapping[str, Params]  # by name; the first phase makes its model from the teacher
    ordinary: bool = False  # new blocks are not fitted, and learn as all else does

    @property
    def start(self) -> int:
        return self.phase.start

    @property
    def end(self) -> int:
        return self.phase.end

    @property
    def _groups(self) -> Groups:
        return () if self.ordinary else groups(self.setup, self.stage, self.phase)

    @property
    def _teacher(self) -> ModelSpec:
        return self.setup.models["teacher"].spec

    def check(self) -> None:
        heads = {self.phase.model.config.shape(layer).num_heads for layer in self.phase.layers}
        for name, term in self.setup.plan(self.stage)[0].objective.state_terms:
            if getattr(term, "heads", None) == "each" and heads != {self._teacher.num_heads}:
                raise UserError(
                    f"objective.{name} compares heads one by one, the teacher has "
                    f"{self._teacher.num_heads} and a compact block {min(heads)}; set heads='mean'"
                )
        before = self.phase.before.abstract()
        jax.eval_shape(self._new_blocks, before.params, jax.random.key(0))
        self.abstract()

    def abstract(self) -> TrainState:
        model = self.phase.model
        return stage.born(self.setup, self.stage, model, self._groups, model.abstract().params)

    def enter(self, before: TrainState | None) -> TrainState:
        old = self.given["teacher"] if before is None else before.params["student"]
        began = time.perf_counter()
        with Compiling() as compiling:
            params = jax.block_until_ready(self._swapped(old))
        seconds = time.perf_counter() - began
        if self.setup.config.substitution.fit_steps and not self.ordinary:
            params = self._fitted(old, params)
        began = time.perf_counter()
        with compiling:
            found = jax.block_until_ready(self._state(before, params))
        if not self.ordinary:
            self._note(seconds + time.perf_counter() - began, compiling.seconds)
        return found

    def _fitted(self, old: Params, params: Params) -> Params:
        """The parameters after the regression, whose folder stays until the next one begins."""
        folder = self.setup.folder / self.stage.name / "fitted"
        if jax.process_index() == 0:
            (folder / str(self.phase.number - 1)).rmtree(missing_ok=True)
        folder = folder / str(self.phase.number)
        return fitted(self.setup, self.stage, self.phase, old, self._model(params), folder)

    def _model(self, params: Params) -> Model:
        return Model(params, self.phase.model.abstract().graphdef)

    def _state(self, before: TrainState | None, params: Params) -> TrainState:
        if before is None:
            return stage.born(self.setup, self.stage, self.phase.model, self._groups, params)
        make_optimizer = functools.partial(
            optim.make_optimizer, self.stage.optim, groups=self._groups
        )
        table, mesh = family.PARTITION, self.setup.mesh
        return state.continued(before, self._model(params), make_optimizer, table, mesh)

    def _new_blocks(self, old: Params, key: Array) -> Params:
        """The compact blocks, by layer; can be traced."""
        before, layers = self.phase.before, self.phase.layers
        shape = self.phase.model.config.shape(layers[0])
        init = self.setup.config.substitution.init
        model = Model(old, before.abstract().graphdef)
        new, _ = compact.replace(model, before.family, before.config, layers, shape, init, key)
        return {layer: new.params["backbone"]["blocks"][layer] for layer in layers}

    def _swapped(self, old: Params) -> Params:
        """The old parameters with the compact blocks' in place."""
        shapes = self.phase.model.abstract().params
        places = sharding.shardings(
            sharding.param_specs(family.PARTITION, shapes, self.setup.mesh), self.setup.mesh
        )
        places = {layer: places["backbone"]["blocks"][layer] for layer in self.phase.layers}
        key = jax.random.fold_in(jax.random.key(self.setup.config.seed), 1 + self.phase.number)
        make = jax.jit(lambda old, key: self._new_blocks(old, key), out_shardings=places)
        blocks = old["backbone"]["blocks"] | make(old, key)
        return old | {"backbone": old["backbone"] | {"blocks": blocks}}

    def _note(self, seconds: float, compiling: float) -> None:
        """A row of swaps.csv, and a line."""
        phase = self.phase
        row = {
            "step": phase.start,
            "phase": phase.number,
            "blocks": " ".join(map(str, phase.layers)),
            "parameters": phase.parameters,
            "seconds": round(seconds, 4),
            "compile_seconds": round(compiling, 4),
        }
        log.info(
            "%s, phase %d: blocks %s are compact, %s parameters; swapped in %.2f s, %.2f s of them "
            "compiling",
            *(self.stage.name, phase.number, row["blocks"], f"{phase.parameters:,}"),
            *(seconds, compiling),
        )
        if jax.process_index() == 0:
            table = Table(self.setup.folder / self.stage.name / "swaps.csv", phase.start - 1)
            table.add(row)
            table.close()


def groups(setup: Any, this: Stage, phase: Phase) -> Groups:
    """The optimizer's groups in a phase: compact blocks have a learning rate of their own."""
    settings = setup.config.substitution
    return phase.groups(settings.learning_rate / this.optim.learning_rate, settings.warmup)
