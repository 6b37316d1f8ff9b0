"""Distils language models, classifiers and span models: trains stage after stage, prints a table.

`config.stages` lists what is trained (kd_jax/config.py knows some stages by their names): `teacher`
and further teachers (config.teachers) are trained on the labels, or only evaluated if they are not
listed; `assistant` on config.objective, from the teachers; `baseline` is the student on the labels
alone; `student` the same student on config.objective, from the assistant if there is one, else from
the teachers. Baseline and student start from the same parameters and see the same batches, so they
differ only by the objective. With a stage `intermediate` the student is first trained on
config.intermediate (hidden states, attention: TinyBERT's two stages) and continues from its last
checkpoint. `substitute`, `prune` and `theseus` make the teacher itself smaller (kd_jax/stages), on
the same batches in the same order.

The best checkpoint of a stage is the one with the best primary metric on held-out training data.
Reported metrics come from another split, if there is one, and select nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from kd_jax import storage
from kd_jax.errors import UserError
from kd_jax.recipes import export
from kd_jax.report import runs
from kd_jax.run import measure, results, stage, teaching
from kd_jax.run.models import check_types
from kd_jax.run.prompts import beginnings
from kd_jax.run.results import Stopwatch
from kd_jax.run.run import Run, build
from kd_jax.run.stage import Parameters, Stage
from kd_jax.run.teaching import TeacherLogits
from kd_jax.run.workdir import RunDirectory
from kd_jax.train import loop
from kd_jax.train.checkpoint import resume_from
from kd_jax.train.records import Listener
from kd_jax.types import Model

log = logging.getLogger(__name__)


def run(config: ConfigDict, place: RunDirectory) -> dict[str, Any]:
    """Runs, or continues, the run in `place` and returns its results (see results.json)."""
    watch, folder = Stopwatch(), place.folder
    if found := results.finished(folder):
        return found
    with watch.section("start-up"):
        built = build(config, folder)
        check(built)
        parameters = teaching.given_teachers(built)
        data = built.task.prepare()
        for this in [each for each in built.stages if each.prompt_tokens]:
            beginnings(built, this, this.prompt_tokens, "train")
    place.begin(built, data)
    for line in results.describe_data(data, built.task.seq_len):
        log.info("%s", line)
    teachers, figures = TeacherLogits(built, parameters), {}
    with watch.section("teachers' logits"):
        for name in [*parameters]:
            figures[name] = measure.of_given(built, name, teachers)
    with place.listening(config) as listeners:
        for number, name in enumerate([each.name for each in built.stages], 1):
            this = built.ready(name, parameters)
            log.info("stage %d of %d, %s", number, len(built.stages), results.describe_stage(this))
            with watch.section("teachers' logits"):
                teaching.stored_logits(built, this, teachers)
            with watch.section(name):
                figures |= run_stage(built, this, parameters, teachers, built.split, listeners)
    found = place.about(built, data) | {"roles": results.roles(built), "stages": figures}
    found["remarks"] = results.remarks(figures, built.task, found["roles"])
    _end(built, parameters, found, watch)
    results.together("end of the run")
    return found


def check(run: Run) -> None:
    """Raises UserError before any training if a later stage would fail: unreadable parameters,
    widths that do not fit, different tokenizers, no checkpoint to resume."""
    if run.task.of_examples:
        texts = run.task.examples(run.task.splits[0]).pairs[0]
        for name, model in run.models.items():
            if name in run.tokenizers:
                check_types(name, model, run.tokenizers[name], texts)
    parameters = {name: model.abstract().params for name, model in run.models.items()}
    for this in run.stages:
        if this.recipe != "distil":
            raise UserError(f"stage {this.name} is one of the recipe {this.recipe!r} alone")
        for phase in this.phases(run, parameters):
            phase.check()
        if this.resume:
            resume_from(this.resume, this.steps).close()
        if this.learns:
            teaching.check(run, this)


def run_stage(
    run: Run,
    this: Stage,
    parameters: Parameters,
    teachers: TeacherLogits,
    split: str,
    listeners: Sequence[Listener] = (),
) -> dict[str, dict[str, Any]]:
    """Trains, or continues, a stage in run.folder/STAGE; adds its best parameters to `parameters`.

    Returns metrics on `split` by name: first those of the model it started from, if these are
    reported, then the stage's.
    """
    folder, task, found = run.folder / this.name, run.tasks[this.model], {}
    batches_of = this.batches_of or teaching.teacher_and_batches
    teacher, stream = batches_of(run, this, teachers)
    own_text = this.own_text and this.own_text(run, this, teachers.model(this.teachers[0]))

    def figures(student: Model, split: str) -> dict[str, Any]:
        found = measure.figures(run, this, student, teachers, split)
        return found | (own_text.figures(student, split) if own_text else {})

    first, *others = this.phases(run, parameters)
    enter = lambda state: teaching.fitted(run, this, teachers, first.enter(state))  # noqa: E731
    phases = [dataclasses.replace(first, enter=enter), *others]
    if this.reports_start:
        start = functools.partial(first.enter, None)
        found[this.reports_start] = measure.of_start(run, this, start, teachers)
    if jax.process_index() == 0:
        overview = run.models[this.model].abstract().params
        results.write_overview(this.name, overview, folder / "parameters.txt")

    def validate(student: Model) -> dict[str, float]:
        own = figures(student, split="validation")
        return {name: value for name, value in own.items() if isinstance(value, float)}

    fitted = stage.train(
        run,
        this,
        phases,
        stream=stream,
        teacher=teacher,
        validate=validate if this.select else None,
        selection=loop.Selection(task.primary, task.larger, run.config.get("patience", 0)),
        directory=folder,
        listeners=listeners,
        writer=this.writing and this.writing.writer(run, this),
        samples=own_text and (lambda: own_text.samples),
    )
    parameters[this.model] = run.models[this.model].cut(fitted.state.params["student"])
    for line in results.describe_end(this, fitted):
        log.info("%s", line)

    def reported() -> dict[str, Any]:
        own = figures(fitted.state.student, split=split)
        if this.model in run.made or not task.of_examples:
            own |= measure.size(run, parameters[this.model])
        if task.of_examples:
            own |= {"steps": fitted.steps}
            results.write_epochs(run.folder, this.name)
        else:
            own |= measure.training_cost(run, this, parameters)
        return own | {"best_step": fitted.best_step} | results.speed(folder)

    found[this.name] = results.kept(folder / "results.json", reported)
    return found


def _end(run: Run, parameters: Parameters, found: dict[str, Any], watch: Stopwatch) -> None:
    """Finishes the run: costs, export, plots, results, table; the first process writes them."""
    folder, last = run.folder, run.principal
    if "cost" in run.config:
        with watch.section("cost"):
            costs = measure.costs(run, parameters, run.config.cost.repeats)
        models = {this.name: this.model for this in run.stages}
        for name, figures in found["stages"].items():
            figures.update(costs.get(models.get(name, name), {}))
    with watch.section("export"):
        found["export"] = export.export_run(run, last, parameters[last.model], found)
    if jax.process_index() > 0:
        return
    found |= watch.report()
    from kd_jax.report import plots  # with matplotlib, which takes half a second to import

    curves = plots.curves({folder.name: [(found, runs.curves(folder))]})
    plots.draw(curves, folder.name, folder / "plots")
    storage.write_json(folder / "results.json", found)
    results.show(folder, found)
