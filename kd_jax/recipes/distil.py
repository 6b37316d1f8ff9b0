"""Distillation, of language models and in fine-tuning: stage after stage, then one table.

`config.stages` lists what is trained (kd_jax/config.py knows some stages by their names): `teacher`
and further teachers (config.teachers) on the labels, left out where they are good as they come, and
judged all the same; `assistant` on config.objective beside the teachers; `baseline` the student on
the labels; `student` the same student on config.objective, beside the assistant where there is one
and else the teachers. Baseline and student start from the same parameters and see the same batches,
so their difference is the objective's. With a stage `intermediate` the student is first trained on
config.intermediate (hidden states, attention: TinyBERT's two stages) and goes on from its last
checkpoint. `substitute`, `prune` and `theseus` make the teacher itself smaller (kd_jax/stages), on
the same batches in the same order.

The best checkpoint of a stage is the one of the best primary figure on held-out training data; what
is reported, of another split where there is one, selects nothing.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import jax
from ml_collections import ConfigDict

from kd_jax import storage
from kd_jax.errors import UserError
from kd_jax.recipes import export
from kd_jax.report import plots, runs
from kd_jax.run import cost, measure, results, stage, workdir
from kd_jax.run.answers import Answers, given_teachers
from kd_jax.run.models import check_types
from kd_jax.run.results import Stopwatch, kept
from kd_jax.run.run import Run, build
from kd_jax.run.stage import Stage
from kd_jax.run.teaching import ask_teachers, check_tokens, teaching
from kd_jax.run.workdir import RunDirectory
from kd_jax.train import loop, sharding
from kd_jax.types import Model, Params

log = logging.getLogger(__name__)

Figures = dict[str, dict[str, Any]]  # by stage


def run(config: ConfigDict, place: RunDirectory) -> dict[str, Any]:
    """Runs what is left of the run in `place` and returns its results (see results.json)."""
    watch, folder = Stopwatch(), place.folder
    if found := results.finished(folder):
        return found
    with watch.part("start-up"):
        built = build(config, folder)
        check(built)
        given = given_teachers(built)
        data = built.task.prepare()
    place.begin(config, built, data)
    for line in built.shapes():
        log.info("%s", line)
    wandb_run = workdir.open_wandb(config, folder)
    answers, figures = Answers(built, given), {}
    with watch.part("teachers' answers"):
        for name in [*given]:
            figures[name] = measure.of_given(built, name, answers)
    for each in built.settings:
        this = ready(built, each.name, given)
        with watch.part("teachers' answers"):
            ask_teachers(built, this, answers)
        with watch.part(this.name):
            figures |= run_stage(built, this, given, answers, built.split, wandb_run)
    given = sharding.to_host(given)
    found = place.about(config) | _about(built, data) | {"stages": figures}
    if jax.process_index() == 0:
        _end(built, given, found, watch)
    if wandb_run is not None:
        wandb_run.finish()
    results.together("end of the run")
    return found


def check(run: Run) -> None:
    """Finds before the long work what a later stage would fail of: weights that cannot be read,
    widths that do not fit, tokens that differ, nothing to resume."""
    if run.task.of_examples:
        texts = run.task.examples(run.task.splits[0]).pairs[0]
        for name, model in run.models.items():
            if name in run.tokenizers:
                check_types(name, model, run.tokenizers[name], texts)
    given = {name: model.abstract().params for name, model in run.models.items()}
    for this in run.stages:
        if this.recipe != "distil":
            raise UserError(f"stage {this.name} is one of the recipe {this.recipe!r} alone")
        for phase in this.phases(run, given):
            phase.check()
        if this.resume:
            loop.resume_from(this.resume, this.steps).close()
        if this.learns and run.task.of_examples:
            run.weights(this.teachers)
            check_tokens(run, this)


def ready(run: Run, name: str, given: dict[str, Params]) -> Stage:
    """The stage of that name, when what its model depends on has been measured."""
    prepare = run.stage(name).prepare
    if prepare is not None:
        prepare(given)
        run.make_stages()
    return run.stage(name)


def run_stage(
    run: Run,
    this: Stage,
    given: dict[str, Params],
    answers: Answers,
    split: str,
    wandb_run: Any = None,
) -> Figures:
    """Trains a stage, or what is left of it, in run.folder/STAGE; returns its figures on `split`,
    after those of what it started from. Its best parameters go into `given`, under the name of its
    model."""
    config, folder, task = run.config, run.folder / this.name, run.tasks[this.model]
    teacher, stream = teaching(run, this, answers)
    found = {
        name: measure.of_start(run, this, name, params, answers)
        for name, params in this.starts(given).items()
    }
    if jax.process_index() == 0:
        overview = run.models[this.model].abstract().params
        stage.write_overview(this.name, overview, folder / "parameters.txt")
    figures = functools.partial(measure.figures, run, this, answers=answers)

    def validate(student: Model) -> dict[str, float]:
        own = figures(student, split="validation")
        return {name: value for name, value in own.items() if isinstance(value, float)}

    # Where config.eval.every is 0, once an epoch.
    every = config.eval.every or max(1, round(this.steps / max(1.0, this.epochs)))
    fitted = stage.train(
        this.phases(run, given),
        stage=this,
        stream=stream,
        teacher=teacher,
        validate=validate if this.select else None,
        selection=loop.Selection(task.primary, task.larger, config.get("patience", 0)),
        intervals=loop.Intervals(every, config.checkpoint.get("every", every), config.log.every),
        keep=config.checkpoint.keep,
        directory=folder,
        wandb_run=wandb_run,
    )
    given[this.model] = fitted.state.params["student"]

    def reported() -> dict[str, Any]:
        own = figures(fitted.state.student, split=split)
        if task.of_examples:
            _write_epochs(run, this)
            own |= {"steps": fitted.steps}
        else:
            own |= measure.size(run, given[this.model]) | cost.of_training(run, this, given)
        return own | {"best_step": fitted.best_step} | results.speed(folder)

    return found | {this.name: kept(folder / "results.json", reported)}


def _write_epochs(run: Run, this: Stage) -> None:
    if jax.process_index() == 0:
        curves = runs.curves(run.folder)[this.name]
        rows = runs.by_evaluation(curves.training, curves.validation)
        storage.write_json(run.folder / this.name / "epochs.json", rows)


def _about(run: Run, data: dict) -> dict[str, Any]:
    """What results.json says of the figures' models and data."""
    found = {
        "models": {k: {"name": m.name, "commit": m.commit} for k, m in run.models.items()},
        "data": data,
        "split": run.split,
        "roles": results.roles(run),
    }
    return found | ({"primary": run.task.primary} if run.task.of_examples else {})


def _end(run: Run, given: dict[str, Params], found: dict[str, Any], watch: Stopwatch) -> None:
    """What the first process does after the last stage: costs, export, plots, results, table."""
    folder, last = run.folder, run.principal
    if "cost" in run.config:
        with watch.part("cost"):
            costs = cost.measure(run, given, run.config.cost.repeats)
        models = {this.name: this.model for this in run.stages}
        for name, figures in found["stages"].items():
            figures.update(costs.get(models.get(name, name), {}))
    with watch.part("export"):
        found["export"] = export.export_run(run, last, given[last.model], found)
    found |= watch.report()
    curves = plots.curves({folder.name: [(found, runs.curves(folder))]})
    plots.draw(curves, folder.name, folder / "plots")
    storage.write_json(folder / "results.json", found)
    results.show(folder, found)
