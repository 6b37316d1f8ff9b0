"""Distillation in language-model pretraining: teacher -> baseline -> student, one table.

The stages of a run, as `config.stages` lists them: `teacher` trains the teacher on the labels
(left out where it is good as it comes), `baseline` the student on the labels, `student` the same
student on `config.objective`. Baseline and student start from the same parameters and see the
same batches, so their difference is the objective's.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import statistics
import time
from typing import Any

import jax
from clu import parameter_overview
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from kd_jax.errors import UserError
from kd_jax.evals import plots, runs, table
from kd_jax.models import family, surgery
from kd_jax.recipes import blueprint, export, workdir
from kd_jax.recipes.setup import Setup, Stage
from kd_jax.schedules import learning_rate
from kd_jax.train import loop, optim, records, sharding, state
from kd_jax.train.evaluate import evaluate
from kd_jax.types import Array, Model, Params

log = logging.getLogger(__name__)


def run(config: ConfigDict, folder: epath.Path) -> dict[str, Any]:
    """Runs what is left of the run in `folder` and returns its results (see results.json)."""
    began = time.time()
    if (folder / "results.json").exists():
        results = json.loads((folder / "results.json").read_text())
        _show(folder, results)
        return results
    setup = Setup(config, folder)
    _check(setup)
    teacher = given_teacher(setup)
    data = setup.task.prepare()
    for line in setup.shapes():
        log.info("%s", line)
    first = jax.process_index() == 0
    wandb_run = _open_wandb(config, folder) if config.wandb and first else None
    figures: dict[str, dict] = {}
    for stage in setup.stages:
        params, figures[stage.name] = _run_stage(setup, stage, teacher, wandb_run)
        if stage.name == "teacher":
            teacher = params
    results = {
        "config": workdir.config_name(folder),
        "config_hash": workdir.config_hash(config),
        "commit": workdir.commit(),
        "seed": config.seed,
        "machine": workdir.machine(),
        "versions": workdir.manifest()["versions"],
        "models": {
            key: {"name": model.name, "commit": model.commit}
            for key, model in (("teacher", setup.teacher), ("student", setup.student))
        },
        "data": data,
        "split": _test_split(config),
        "stages": figures,
    }
    if jax.process_count() > 1:  # the first process exports what may lie on all of them
        params = multihost_utils.process_allgather(params, tiled=True)
    if first:
        results["export"] = export.export_run(setup, setup.stages[-1].name, params, results)
        results["seconds"] = round(time.time() - began, 1)
        plots.draw({folder.name: [runs.curves(folder)]}, folder / "plots")
        workdir.write(folder / "results.json", results)
        _show(folder, results)
    if wandb_run is not None:
        wandb_run.finish()
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("end of the run")
    return results


def _check(setup: Setup) -> None:
    """Finds before the long work what a later stage would fail of: weights that cannot be read,
    widths that do not fit, a wrong objective, schedule or optimizer, nothing to resume."""
    teacher = setup.teacher.abstract().params
    for stage in setup.stages:
        create_state(setup, stage, teacher, abstract=True)
        learning_rate(stage.optim, stage.steps)
        if stage.name == "student" and setup.config.resume:
            loop.resume_from(setup.config.resume, stage.steps).close()


def _open_wandb(config: ConfigDict, folder: epath.Path) -> Any:
    return records.open_wandb(config.wandb, folder.name, workdir.resolved(config), folder)


def _show(folder: epath.Path, results: dict) -> None:
    if jax.process_index() == 0:
        title = f"{results['config']}, {results['split']} split"
        table.of_runs([results["stages"]], title).print()
        print(f"exported: {results['export']['path']}\ncurves: {folder / 'plots'}", flush=True)


def _test_split(config: ConfigDict) -> str:
    return "test" if config.data.get("test") else "validation"


def initial_params(setup: Setup, stage: Stage, teacher: Params | None, key: Array):
    """(init, inputs) of `state.create` for the model of a stage, by `student.init`."""
    if stage.name == "teacher":
        if setup.teacher.folder is None:
            return setup.teacher.draw, key
        return (lambda params: params), setup.teacher.load(key)
    student = setup.student
    if setup.config.student.init == "teacher":

        def from_teacher(params: Params) -> Params:
            whole = setup.teacher.abstract().replace(params=params)
            layers = setup.config.student.layers
            return surgery.from_teacher(student.abstract(), whole, layers).params

        return from_teacher, teacher
    if setup.config.student.init == "model":
        if not setup.config.student.model:
            raise UserError("config.student.init='model': set student.model to a checkpoint")
        return (lambda params: params), student.load(key)
    if setup.config.student.init != "scratch":
        found = setup.config.student.init
        raise UserError(f"config.student.init={found!r}: have teacher, model, scratch")
    return student.draw, key


def create_state(
    setup: Setup, stage: Stage, teacher: Params | None, abstract: bool = False
) -> state.TrainState:
    """The stage's state before its first step; or its shapes, after all checks."""
    plan, _ = setup.plan(stage)
    key = jax.random.key(setup.config.seed)
    model = setup.teacher if stage.name == "teacher" else setup.student
    init, inputs = initial_params(setup, stage, teacher, jax.random.fold_in(key, 0))
    if abstract:
        inputs = jax.eval_shape(lambda x: x, inputs)
    objective_key = jax.random.fold_in(key, 1)

    def both(inputs):
        own = plan.objective.init(objective_key, setup.student.spec, setup.teacher.spec)
        return {"student": init(inputs), "objective": own}

    make_optimizer = functools.partial(optim.make_optimizer, stage.optim)
    return state.create(
        both, inputs, model.abstract().graphdef, make_optimizer, plan.table, setup.mesh
    )


def given_teacher(setup: Setup) -> Params | None:
    """The teacher's parameters where no stage trains it."""
    if any(stage.name == "teacher" for stage in setup.stages):
        return None
    key = jax.random.fold_in(jax.random.key(setup.config.seed), 0)
    if setup.teacher.folder is None:
        log.warning("the teacher has random parameters: no teacher.model, no teacher stage")
        return setup.teacher.draw(key)
    return setup.teacher.load(key)


def frozen_teacher(setup: Setup, params: Params) -> Model:
    """The teacher as an argument of the step: in its operand type, laid out on the mesh."""
    specs = sharding.param_specs(family.PARTITION, params, setup.mesh)
    kept = blueprint.stored(params, setup.policy)
    placed = jax.device_put(kept, sharding.shardings(specs, setup.mesh))
    return Model(placed, setup.teacher.abstract().graphdef)


def _run_stage(
    setup: Setup, stage: Stage, teacher: Params | None, wandb_run: Any
) -> tuple[Params, dict]:
    """Trains a stage, or what is left of it; its best parameters and its held-out figures."""
    config, folder = setup.config, setup.folder / stage.name
    frozen = None if stage.name == "teacher" else frozen_teacher(setup, teacher)
    plan, knobs = setup.plan(stage)
    processes = dict(process_index=jax.process_index(), process_count=jax.process_count())
    eval_plan = setup.held_out_plan(beside_teacher=frozen is not None)

    def measure(student: Model, split: str) -> dict[str, float]:
        stream = setup.task.held_out(split, config.eval.batch_size, **processes)
        found = evaluate(student, stream, frozen, eval_plan)
        perplexity = math.exp(min(found["loss"], 700.0))
        return {"loss": found.pop("loss"), "perplexity": perplexity, **found}

    born = create_state(setup, stage, teacher)
    if jax.process_index() == 0:
        _write_overview(stage.name, born.params["student"], folder / "parameters.txt")
    fitted = loop.fit(
        born,
        stage=stage.name,
        plan=plan,
        stream=setup.task.train(stage.batch_size, config.seed, **processes),
        teacher=frozen if stage.name == "student" else None,
        schedules=loop.Schedules(
            learning_rate(stage.optim, stage.steps), knobs.weights, knobs.temperatures, config.seed
        ),
        steps=stage.steps,
        validate=functools.partial(measure, split="validation"),
        intervals=loop.Intervals(config.eval.every, config.checkpoint.every, config.log.every),
        keep=config.checkpoint.keep,
        directory=folder,
        resume=config.resume if stage.name == "student" else "",
        wandb_run=wandb_run,
    )
    params = fitted.state.params["student"]
    if (folder / "results.json").exists():
        return params, json.loads((folder / "results.json").read_text())
    figures = measure(fitted.state.student, _test_split(config)) | {
        "parameters": count(params),
        "size_mb": round(sum(x.nbytes for x in jax.tree.leaves(params)) / 1e6, 2),
        "steps": stage.steps,
        "best_step": fitted.best_step,
        **_speed(folder),
    }
    if jax.process_index() == 0:
        workdir.write(folder / "results.json", figures)
    return params, figures


def _write_overview(stage: str, params: Params, path: epath.Path) -> None:
    """A table of all parameters to `path`, their number to the log."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(parameter_overview.get_parameter_overview(params, include_stats=False) + "\n")
    log.info("%s: %s parameters: %s", stage, f"{count(params):,}", path)


def count(params: Params) -> int:
    """Number of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _speed(folder: epath.Path) -> dict[str, float]:
    """Median tokens a second and share of time spent waiting for batches, over the whole stage."""
    rows = records.read(folder / "timing.csv")
    if not rows:
        return {"tokens_per_second": None}
    seconds = [float(row["seconds"]) for row in rows]
    waits = [float(row["input_wait_fraction"]) for row in rows]
    waited = sum(s * w for s, w in zip(seconds, waits, strict=True))
    return {
        "tokens_per_second": statistics.median(float(row["tokens_per_second"]) for row in rows),
        "input_wait_fraction": round(waited / sum(seconds), 5),
    }
