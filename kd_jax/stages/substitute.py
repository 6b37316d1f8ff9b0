"""Replaces blocks of the teacher by compact ones, a few at a time, while the model trains.

The stage starts from the teacher's parameters, so its final model is described by its schedule
(swaps.py), not by a section of the config. Each phase begins with a swap, a function of the
checkpoint before it; with config.substitution.fit_steps, new blocks are first fitted to the blocks
that they replace.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
from typing import Any

import jax
from ml_collections import ConfigDict

from kd_jax import plugins
from kd_jax.errors import UserError
from kd_jax.metrics import flops
from kd_jax.models import compact, family
from kd_jax.models.blueprint import Blueprint, count, stored
from kd_jax.models.compact import block_states
from kd_jax.objectives.objective import Objective
from kd_jax.run import stage
from kd_jax.run.results import Compiling
from kd_jax.run.run import Run
from kd_jax.run.settings import Settings
from kd_jax.run.stage import Groups, Parameters, Phase, Stage, first_state
from kd_jax.run.teaching import laid_out, on_mesh
from kd_jax.stages import swaps
from kd_jax.stages.swaps import Swap
from kd_jax.train import loop, optim, sharding, state
from kd_jax.train.records import Table
from kd_jax.train.state import TrainState
from kd_jax.train.step import Program
from kd_jax.types import Array, Counted, Model, Params

log = logging.getLogger(__name__)

SECTION = "substitution"


def make(run: Run, name: str, settings: Settings) -> Stage:
    """Makes the stage that replaces blocks of the teacher by compact ones."""
    found = swaps.of(run)
    run.add(name, found[-1].model)
    return stage.make(
        run,
        settings,
        model=name,
        principal=True,
        made="made of another model with kd_jax, by compact blocks that replaced its own while it "
        "trained on",
        groups=found[-1].groups(run.config.substitution, settings.optim),
        phases_of=lambda run, this, parameters: [
            Substituted(run, this, swap, parameters).phase for swap in found
        ],
        measure_first=swaps.measure_first(run, settings),
        more_training=_regressions(run, settings, found),
        swaps=_table(run, found),
    )


def shapes_student(run: Run) -> bool:
    """Tells whether the config leaves the student's architecture to substitution."""
    student = run.config.student
    return SECTION in run.config and not (student.model or student.architecture)


def make_student(run: Run, settings: Settings) -> Stage:
    """Makes a stage of ordinary distillation into the model that substitution ends with."""
    found = swaps.of(run)
    run.add(settings.model, found[-1].model)
    fields: dict[str, Any] = {"measure_first": swaps.measure_first(run, settings)}
    if run.config.student.init == "teacher":
        whole = swaps.at_once(found)
        fields["phases_of"] = lambda run, this, parameters: [
            Substituted(run, this, whole, parameters, ordinary=True).phase
        ]
    return stage.make(run, settings, **fields)


def _table(run: Run, found: list[Swap]) -> list[dict[str, Any]]:
    """Makes a row for each swap: its steps, the blocks that become compact (None: not yet known),
    and the size of the model after it."""
    whole = count(run.models["teacher"].abstract().params)
    return [
        {
            "phase": swap.number,
            "steps": [swap.start + 1, swap.end],
            "blocks": list(swap.layers) if swaps.known(run) else None,
            "parameters": swap.parameters,
            "reduction_percent": round(100 * (1 - swap.parameters / whole), 2),
        }
        for swap in found
    ]


def _regressions(run: Run, settings: Settings, found: list[Swap]) -> dict[str, int]:
    """Counts the steps and FLOPs of the regressions before the swaps. Each computes the blocks up
    to the last one that goes, and the gradients of all of these."""
    steps = run.config.substitution.fit_steps
    if not steps:
        return {}
    shape = *run.task.shapes(settings.batch_size).tokens_BT.shape, 0

    def lower(model: Blueprint, swap: Swap) -> Counted:
        blocks = model.abstract().params["backbone"]["blocks"]
        below = {layer: blocks[layer] for layer in range(max(swap.layers) + 1)}
        return model.counted({"backbone": below})

    pairs = [(lower(swap.model, swap), [lower(swap.before, swap)]) for swap in found]
    of_steps = sum(flops.train_step(*pair, {}, *shape, vocabulary=False) for pair in pairs)
    return {"fit_steps": steps * len(found), "training_flops": steps * of_steps}


@dataclasses.dataclass(frozen=True)
class Substituted:
    """A swap of blocks and the training steps after it, as a phase of the stage."""

    run: Run
    stage: Stage
    swap: Swap
    parameters: Parameters  # the first phase makes its model from the teacher
    ordinary: bool = False  # new blocks are not fitted, and learn as all else does

    @property
    def phase(self) -> Phase:
        """Makes the phase of the stage that begins with this swap."""
        return Phase(self.swap.start, self.swap.end, self._abstract, self._enter, self._check)

    @property
    def _groups(self) -> Groups:
        if self.ordinary:
            return ()
        return self.swap.groups(self.run.config.substitution, self.stage.optim)

    def _check(self) -> None:
        teacher = self.run.models["teacher"].spec
        heads = {self.swap.model.config.shape(layer).num_heads for layer in self.swap.layers}
        for name, term in self.stage.program.objective.state_terms:
            if getattr(term, "heads", None) == "each" and heads != {teacher.num_heads}:
                raise UserError(
                    f"objective.{name} compares heads one by one, the teacher has "
                    f"{teacher.num_heads} and a compact block {min(heads)}; set heads='mean'"
                )
        before = self.swap.before.abstract()
        jax.eval_shape(self._new_blocks, before.params, jax.random.key(0))
        self._abstract()

    def _first(self, params: Params) -> TrainState:
        model = self.swap.model
        return first_state(self.run, self.stage, params, model=model, groups=self._groups)

    def _abstract(self) -> TrainState:
        return self._first(self.swap.model.abstract().params)

    def _enter(self, before: TrainState | None) -> TrainState:
        if before is None:
            old = on_mesh(self.run, "teacher", self.run.original(self.parameters)).params
        else:
            old = before.params["student"]
        began = time.perf_counter()
        with Compiling() as compiling:
            params = jax.block_until_ready(self._swapped(old))
        seconds = time.perf_counter() - began
        if self.run.config.substitution.fit_steps and not self.ordinary:
            params = self._fitted(old, params)
        began = time.perf_counter()
        with compiling:
            found = self._first(params) if before is None else self._continued(before, params)
            found = jax.block_until_ready(found)
        if not self.ordinary:
            self._note(seconds + time.perf_counter() - began, compiling.seconds)
        return found

    def _fitted(self, old: Params, params: Params) -> Params:
        """Fits the compact blocks to the blocks that they replace by a short regression: mean
        squared error of a block's output, over features and tokens of training text.

        This is a separate `fit`: the student is the model with its new blocks, the only ones that
        train, the teacher is the model before the swap. If several blocks are replaced at once, the
        upper ones read the output of the lower new ones, as they will in training. The folder, from
        which a killed regression continues, stays until the next regression begins.
        """
        run, this, swap, config = self.run, self.stage, self.swap, self.run.config
        folder = run.folder / this.name / "fitted"
        if jax.process_index() == 0:
            (folder / str(swap.number - 1)).rmtree(missing_ok=True)
        make = plugins.load("objectives", "hidden", "make").make
        pairs = tuple((layer + 1, layer + 1) for layer in sorted(swap.layers))
        objective = Objective((), (("fit", make("mse", pairs)),), (), run.policy, run.policy)
        own = ConfigDict(this.optim.to_dict(), type_safe=False)
        own.learning_rate_multipliers = ((swap.pattern, 1.0), (".*", 0.0))
        before = laid_out(Model(stored(old, run.policy), swap.before.abstract().graphdef), run.mesh)
        student = block_states(self._model(params))
        first = state.create(
            lambda params: {"student": params, "objective": {}},
            student.params,
            student.graphdef,
            lambda params: optim.make_optimizer(own, params),
            family.PARTITION,
            run.mesh,
        )
        rate, steps = float(config.substitution.fit_learning_rate), config.substitution.fit_steps
        every = config.checkpoint.get("every", steps)
        found = loop.fit(
            first,
            stage=f"{this.name} {swap.number}, blocks {', '.join(map(str, sorted(swap.layers)))}",
            program=Program(
                objective, run.mesh, family.PARTITION, config.accumulate, dropout=False
            ),
            stream=run.tasks[this.model].train(this.batch_size, config.seed, **run.processes),
            teacher=block_states(before),
            schedules=loop.Schedules(lambda step: rate, {"fit": lambda step: 1.0}, {}, config.seed),
            steps=steps,
            validate=None,
            intervals=loop.Intervals(steps, every, config.log.every),
            keep=1,
            directory=folder / str(swap.number),
        )
        return found.state.params["student"]

    def _model(self, params: Params) -> Model:
        return Model(params, self.swap.model.abstract().graphdef)

    def _continued(self, before: TrainState, params: Params) -> TrainState:
        make = functools.partial(optim.make_optimizer, self.stage.optim, groups=self._groups)
        table, mesh = family.PARTITION, self.run.mesh
        return state.continued(before, self._model(params), make, table, mesh)

    def _new_blocks(self, old: Params, key: Array) -> Params:
        """Makes the compact blocks, by layer; can be traced."""
        before, layers = self.swap.before, self.swap.layers
        shape = self.swap.model.config.shape(layers[0])
        init = self.run.config.substitution.init
        model = Model(old, before.abstract().graphdef)
        new, _ = compact.replace(model, before.family, before.config, layers, shape, init, key)
        return {layer: new.params["backbone"]["blocks"][layer] for layer in layers}

    def _swapped(self, old: Params) -> Params:
        """Returns the old parameters with the compact blocks in place."""
        shapes = self.swap.model.abstract().params
        places = sharding.shardings(
            sharding.param_specs(family.PARTITION, shapes, self.run.mesh), self.run.mesh
        )
        places = {layer: places["backbone"]["blocks"][layer] for layer in self.swap.layers}
        key = jax.random.fold_in(jax.random.key(self.run.config.seed), 1 + self.swap.number)
        make = jax.jit(lambda old, key: self._new_blocks(old, key), out_shardings=places)
        blocks = old["backbone"]["blocks"] | make(old, key)
        return old | {"backbone": old["backbone"] | {"blocks": blocks}}

    def _note(self, seconds: float, compiling: float) -> None:
        """Writes a row of swaps.csv, and logs a line."""
        swap = self.swap
        row = {
            "step": swap.start,
            "phase": swap.number,
            "blocks": " ".join(map(str, swap.layers)),
            "parameters": swap.parameters,
            "seconds": round(seconds, 4),
            "compile_seconds": round(compiling, 4),
        }
        log.info(
            "%s, phase %d: blocks %s are compact, %s parameters; swapped in %.2f s, %.2f s of them "
            "compiling",
            *(self.stage.name, swap.number, row["blocks"], f"{swap.parameters:,}"),
            *(seconds, compiling),
        )
        if jax.process_index() == 0:
            table = Table(self.run.folder / self.stage.name / "swaps.csv", swap.start - 1)
            table.add(row)
            table.close()
