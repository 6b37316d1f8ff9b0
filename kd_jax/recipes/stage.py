"""A stage of a run: one model trained once; and what the stages of all recipes share.

`setup` below is a `recipes.setup.Setup`: the models of the run, as described, and where they live.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from clu import parameter_overview
from etils import epath
from flax import nnx
from ml_collections import ConfigDict

from kd_jax import storage
from kd_jax.data.settings import settings
from kd_jax.errors import UserError
from kd_jax.evals import runs, table
from kd_jax.models import blueprint, family, surgery
from kd_jax.models.blueprint import Blueprint
from kd_jax.run import keys, origins
from kd_jax.train import optim, sharding, state
from kd_jax.train.checkpoint import Checkpoints
from kd_jax.types import Array, Model, Params

log = logging.getLogger(__name__)

Groups = Sequence[tuple[str, optim.Group]]

# Stages that are trained on `config.objective`, beside a teacher.
LEARNERS = ("assistant", "intermediate", "student", "substitute", "prune", "theseus", "round")


@dataclasses.dataclass(frozen=True)
class Stage:
    """The settings of one stage: the config's own, and what `config.stages` says differs."""

    name: str
    model: str  # which of the run's models it trains
    learns: bool  # from a teacher: on config.objective, else on the labels alone
    steps: int
    batch_size: int
    optim: ConfigDict
    epochs: float = 0.0  # fine-tuning: how many, where there are no steps


def stages(config: ConfigDict, have: Mapping[str, str]) -> list[Stage]:
    """The stages of `config.stages`, in the order of `have` (stage -> the model it trains).

    Raises UserError on unknown names and keys.
    """
    if not config.stages or set(config.stages) - have.keys():
        raise UserError(f"config.stages={list(config.stages)}: have {', '.join(have)}")
    found = []
    for name, model in have.items():
        if name not in config.stages:
            continue
        ranges = {key: each for key, each in keys.OF_STAGE.items() if key in config}
        changes = settings(config.stages[name], ranges, f"stages.{name}")
        own = ConfigDict(config.optim.to_dict(), type_safe=False)
        own.update(changes.pop("optim"))
        keys.check_optim(own, f"stages.{name}.optim")
        whole = {key: config[key] for key in ranges} | changes | {"optim": own}
        found.append(Stage(name, model, name in LEARNERS, **whole))
    return found


def initial_params(setup: Any, stage: Stage, given: Mapping[str, Params], key: Array):
    """(init, inputs) of `state.create` for the model of a stage, by its section's `init`.

    `given`: parameters of the models that are there already, by name.
    """
    model, section = setup.models[stage.model], setup.section(stage.model)
    if stage.name == "student" and setup.has_intermediate:
        return (lambda params: params), given["student"]
    init = section.init or ("model" if model.folder else "scratch")
    if init == "teacher":
        source = setup.models["teacher"]
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
    if init != "scratch":
        raise UserError(f"config.{stage.model}.init={init!r}: have teacher, model, scratch")
    return model.draw, key


def create_state(
    setup: Any, stage: Stage, given: Mapping[str, Params], abstract: bool = False
) -> state.TrainState:
    """The stage's state before its first step; or its shapes, after all checks."""
    key = jax.random.key(setup.config.seed)
    init, inputs = initial_params(setup, stage, given, jax.random.fold_in(key, 0))
    if abstract:
        inputs = jax.eval_shape(lambda x: x, inputs)
    return state_of(setup, stage, setup.models[stage.model], setup.groups(stage), init, inputs)


def born(
    setup: Any, stage: Stage, model: Blueprint, groups: Groups, params: Params
) -> state.TrainState:
    """A state at step 0 of a model with these parameters; abstract where they are."""
    return state_of(setup, stage, model, groups, lambda params: params, params)


def state_of(
    setup: Any,
    stage: Stage,
    model: Blueprint,
    groups: Groups,
    init: Callable[[Any], Params],
    inputs: Any,
    graphdef: nnx.GraphDef | None = None,
) -> state.TrainState:
    """A state at step 0, of the parameters that `init` makes of `inputs`; abstract where they are.

    `graphdef`: where the parameters are of another structure than the model alone.
    """
    key = jax.random.fold_in(jax.random.key(setup.config.seed), 1)
    plan, _ = setup.plan(stage)
    teacher = setup.models[setup.teachers_of(stage)[0]]

    def both(inputs):
        own = plan.objective.init(key, model.spec, teacher.spec)
        return {"student": init(inputs), "objective": own}

    make_optimizer = functools.partial(optim.make_optimizer, stage.optim, groups=groups)
    graphdef = graphdef or model.abstract().graphdef
    return state.create(both, inputs, graphdef, make_optimizer, plan.table, setup.mesh)


def abstract_state(setup: Any, stage: Stage) -> state.TrainState:
    """The shapes of a stage's last state, wherever its parameters come from."""
    model = setup.models[stage.model]
    return born(setup, stage, model, setup.groups(stage), model.abstract().params)


def restore_best(setup: Any, stage: Stage) -> Params:
    """The parameters of a stage's best checkpoint."""
    checkpoints = Checkpoints(setup.folder / stage.name / "checkpoints", keep=None)
    if checkpoints.best is None:
        raise UserError(f"{checkpoints.directory}: no checkpoint; run the run's command again")
    restored = checkpoints.restore(checkpoints.best, abstract_state(setup, stage))
    checkpoints.close()
    return restored.params["student"]


def given_params(setup: Any, name: str) -> Params:
    """The parameters of a model that no stage trains."""
    model = setup.models[name]
    key = jax.random.fold_in(jax.random.key(setup.config.seed), 0)
    if model.folder is None:
        init = setup.section(name).init
        log.warning("%s has random parameters: config.%s.init=%r", name, name, init)
        return model.draw(key)
    return model.load(key)


def frozen(setup: Any, name: str, params: Params) -> Model:
    """A model as a teacher: in its operand type, laid out on the mesh."""
    specs = sharding.param_specs(family.PARTITION, params, setup.mesh)
    kept = blueprint.stored(params, setup.policy)
    placed = jax.device_put(kept, sharding.shardings(specs, setup.mesh))
    return Model(placed, setup.models[name].abstract().graphdef)


def write_overview(stage: str, params: Params, path: epath.Path) -> None:
    """A table of all parameters to `path`, their number to the log."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(parameter_overview.get_parameter_overview(params, include_stats=False) + "\n")
    log.info("%s: %s parameters: %s", stage, f"{count(params):,}", path)


def kept(path: epath.Path, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The figures in `path`; where it is not there, those that `measure` gives, which the first
    process writes. What is not finite is None, and said."""
    if path.exists():
        return storage.read_json(path)
    measured = measure()
    found = storage.finite(measured)
    if lost := [key for key, value in measured.items() if value is not None and found[key] is None]:
        log.warning("%s: not finite, null there: %s", path, ", ".join(lost))
    if jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        storage.write_json(path, found)
    return found


def finished(folder: epath.Path) -> dict[str, Any] | None:
    """The results of a run that is over, shown again; None for any other."""
    path = folder / "results.json"
    if not path.exists():
        return None
    results = storage.read_json(path)
    if changed := origins.changed_since(folder):
        log.warning("changed since this run, whose figures stay: %s", ", ".join(changed))
    show(folder, results)
    return results


def show(folder: epath.Path, results: dict) -> None:
    """Prints a finished run's table, in the first process."""
    if jax.process_index() == 0:
        title = f"{results['config']}, {results['split']} split"
        table.of_runs([results["stages"]], title, results.get("primary", "loss")).print()
        print(f"exported: {results['export']['path']}\ncurves: {folder / 'plots'}", flush=True)


def count(params: Params) -> int:
    """Number of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def size_mb(params: Params) -> float:
    """Megabytes of the parameters, as they are exported."""
    return round(sum(x.nbytes for x in jax.tree.leaves(params)) / 1e6, 2)


def speed(folder: epath.Path) -> dict[str, float | None]:
    """Median tokens and rows a second, and the share of time spent waiting for batches."""
    found = runs.read_columns(folder / "timing.csv")
    if not found:
        return {"tokens_per_second": None}
    waited = (found["seconds"] * found["input_wait_fraction"]).sum()
    return {
        "tokens_per_second": float(np.median(found["tokens_per_second"])),
        "rows_per_second": float(np.median(found["rows_per_second"])),
        "input_wait_fraction": round(float(waited / found["seconds"].sum()), 5),
    }
