"""Distillation in language-model pretraining: teacher -> baseline -> student, one table.

The stages of a run, as `config.stages` lists them: `teacher` trains the teacher on the labels
(left out where it is good as it comes, and judged all the same), `baseline` the student on the
labels, `student` the same student on `config.objective`. Baseline and student start from the same
parameters and see the same batches, so their difference is the objective's.
"""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from kd_jax import storage
from kd_jax.evals import plots, runs
from kd_jax.models import family
from kd_jax.recipes import export, parts, stage, workdir
from kd_jax.recipes.setup import TextSetup as Setup
from kd_jax.recipes.stage import Stage
from kd_jax.recipes.workdir import RunDirectory
from kd_jax.schedules import learning_rate
from kd_jax.train import loop, sharding
from kd_jax.train.passes import evaluate
from kd_jax.types import Model, Params

log = logging.getLogger(__name__)


def run(
    config: ConfigDict, place: RunDirectory, make_setup: Callable[..., Setup] = Setup
) -> dict[str, Any]:
    """Runs what is left of the run in `place` and returns its results (see results.json).

    `make_setup`: that of another recipe whose stages train language models.
    """
    began, folder = time.time(), place.folder
    if results := stage.finished(folder):
        return results
    setup = make_setup(config, folder)
    _check(setup)
    params: dict[str, Params] = {}  # of the models that are there, by name
    if not any(each.model == "teacher" for each in setup.stages):
        params["teacher"] = stage.given_params(setup, "teacher")
    data = setup.task.prepare()
    place.begin(config, setup, data)
    for line in setup.shapes():
        log.info("%s", line)
    first = jax.process_index() == 0
    wandb_run = workdir.open_wandb(config, folder)
    figures: dict[str, dict] = {}
    if "teacher" in params:
        figures["teacher"] = _judge(setup, "teacher", "teacher", params["teacher"])
    for each in setup.stages:
        params[each.model], found = _run_stage(setup, each, params, wandb_run)
        figures |= found
    results = place.about(config) | {
        "models": {k: {"name": m.name, "commit": m.commit} for k, m in setup.models.items()},
        "data": data,
        "split": _test_split(config),
        "stages": figures,
    }
    exported = sharding.to_host(params[setup.principal.model])
    if first:
        results["export"] = export.export_run(setup, setup.principal, exported, results)
        results["seconds"] = round(time.time() - began, 1)
        plots.draw({folder.name: [runs.curves(folder)]}, folder / "plots")
        storage.write_json(folder / "results.json", results)
        stage.show(folder, results)
    if wandb_run is not None:
        wandb_run.finish()
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("end of the run")
    return results


def _check(setup: Setup) -> None:
    """Finds before the long work what a later stage would fail of: weights that cannot be read,
    widths that do not fit, a wrong objective, schedule or optimizer, nothing to resume."""
    given = {name: model.abstract().params for name, model in setup.models.items()}
    for each in setup.stages:
        for part in setup.parts(each, given):
            part.check()
        learning_rate(each.optim, each.steps)
        if each.name == "student" and setup.config.resume:
            loop.resume_from(setup.config.resume, each.steps).close()


def _test_split(config: ConfigDict) -> str:
    return "test" if config.data.get("test") else "validation"


def _run_stage(
    setup: Setup, this: Stage, given: dict[str, Params], wandb_run: Any
) -> tuple[Params, dict[str, dict]]:
    """Trains a stage, or what is left of it; its best parameters and its held-out figures, after
    those of what it started from."""
    config, folder = setup.config, setup.folder / this.name
    frozen = None
    if this.name != "teacher":
        frozen = stage.frozen(setup, "teacher", given["teacher"])
    plan, knobs = setup.plan(this)
    measure = functools.partial(_measure, setup, frozen)
    setup.prepare(this, given)
    found = {
        name: _judge(setup, name, this.model, params, frozen)
        for name, params in setup.starts(this, given).items()
    }
    if jax.process_index() == 0:
        overview = setup.models[this.model].abstract().params
        stage.write_overview(this.name, overview, folder / "parameters.txt")
    fitted = parts.train(
        setup.parts(this, given),
        stage=this.name,
        plan=plan,
        stream=setup.task.train(this.batch_size, config.seed, **_processes()),
        teacher=frozen if this.learns else None,
        schedules=loop.Schedules(
            learning_rate(this.optim, this.steps),
            knobs.weights,
            knobs.temperatures,
            config.seed,
            setup.draws(this),
        ),
        validate=functools.partial(measure, "validation"),
        intervals=loop.Intervals(config.eval.every, config.checkpoint.every, config.log.every),
        keep=config.checkpoint.keep,
        directory=folder,
        resume=config.resume if this.name == "student" else "",
        wandb_run=wandb_run,
    )
    params = fitted.state.params["student"]

    def figures() -> dict[str, Any]:
        own = setup.effort(this, given) | {"best_step": fitted.best_step} | stage.speed(folder)
        return measure(_test_split(config), fitted.state.student) | _size(setup, params) | own

    return params, found | {this.name: stage.kept(folder / "results.json", figures)}


def _judge(
    setup: Setup, name: str, model: str, params: Params, frozen: Model | None = None
) -> dict[str, float]:
    """Held-out figures of parameters that no stage has trained; kept in the folder of `name`."""

    def figures() -> dict[str, float]:
        specs = sharding.param_specs(family.PARTITION, params, setup.mesh)
        placed = jax.device_put(params, sharding.shardings(specs, setup.mesh))
        whole = Model(placed, setup.models[model].abstract().graphdef)
        return _measure(setup, frozen, _test_split(setup.config), whole) | _size(setup, params)

    return stage.kept(setup.folder / name / "results.json", figures)


def _measure(setup: Setup, frozen: Model | None, split: str, student: Model) -> dict[str, float]:
    """Held-out figures of a model, beside a teacher where there is one."""
    stream = setup.task.held_out(split, setup.config.eval.batch_size, **_processes())
    plan = setup.held_out_plan(beside_teacher=frozen is not None)
    found = evaluate(student, stream, frozen, plan)
    perplexity = math.exp(min(found["loss"], 700.0))
    return {"loss": found.pop("loss"), "perplexity": perplexity, **found}


def _size(setup: Setup, params: Params) -> dict[str, float]:
    size, whole = stage.count(params), stage.count(setup.models["teacher"].abstract().params)
    return {
        "parameters": size,
        "reduction_percent": round(100 * (1 - size / whole), 2),
        "size_mb": stage.size_mb(params),
    }


def _processes() -> dict[str, int]:
    return dict(process_index=jax.process_index(), process_count=jax.process_count())
