"""Distillation in fine-tuning: teachers -> assistant -> baseline -> student, one table.

`config.stages` lists what is trained: `teacher` and further teachers (config.teachers) on the
labels, `assistant` on config.objective beside the teachers, `baseline` the student on the labels,
`student` the same student on config.objective, beside the assistant where there is one and else the
teachers, `theseus` a student whose blocks replace the teacher's at random (theseus.py). With a
stage `intermediate` the student is first trained on config.intermediate (hidden
states, attention: TinyBERT's two stages) and goes on from its last checkpoint. Teachers that no
stage trains are taken as they come. Baseline and student start from the same parameters and see the
same batches, so their difference is the objective's.

The best checkpoint of a stage is the one of the best primary metric on held-out training data; what
is reported, of another split, selects nothing.
"""

from __future__ import annotations

import logging
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from kd_jax import storage
from kd_jax.evals import epochs, plots, runs
from kd_jax.evals.beside import beside_teacher
from kd_jax.models import family, replacement
from kd_jax.recipes import costs, export, parts, stage, workdir
from kd_jax.recipes.answers import Answers
from kd_jax.recipes.finetune_setup import FinetuneSetup as Setup
from kd_jax.recipes.finetune_setup import check_types
from kd_jax.recipes.stage import Stage
from kd_jax.recipes.stopwatch import Stopwatch
from kd_jax.recipes.teaching import ask_teachers, check_tokens, teaching
from kd_jax.recipes.workdir import RunDirectory
from kd_jax.schedules import learning_rate
from kd_jax.train import loop, sharding
from kd_jax.train.passes import predict
from kd_jax.types import Model, Params

log = logging.getLogger(__name__)


def run(config: ConfigDict, place: RunDirectory) -> dict[str, Any]:
    """Runs what is left of the run in `place` and returns its results (see results.json)."""
    watch, folder = Stopwatch(), place.folder
    if results := stage.finished(folder):
        return results
    with watch.part("start-up"):
        setup = Setup(config, folder)
        data = setup.task.prepare()
        log.info("%s", setup.describe_machine())
        check(setup)
        given = given_teachers(setup)
    place.begin(config, setup, data)
    first = jax.process_index() == 0
    wandb_run = workdir.open_wandb(config, folder)
    answers, figures = Answers(setup, given), {}
    with watch.part("teachers' answers"):
        for name in given:
            figures[name] = teacher_figures(setup, name, answers, setup.split)
    for this in setup.stages:
        with watch.part("teachers' answers"):
            ask_teachers(setup, this, answers)
        with watch.part(this.name):
            figures[this.name] = run_stage(
                setup, this, given, answers, folder, setup.split, wandb_run
            )
    given = sharding.to_host(given)
    results = place.about(config) | {
        "primary": setup.task.primary,
        "models": {k: {"name": m.name, "commit": m.commit} for k, m in setup.models.items()},
        "data": data,
        "split": setup.split,
        "stages": figures,
    }
    if first:
        with watch.part("cost"):
            cost = costs.measure(setup, given, config.cost.repeats)
        models = {this.name: this.model for this in setup.stages}
        for name, found in figures.items():
            found.update(cost[models.get(name, name)])
        last = setup.stages[-1]
        with watch.part("export"):
            results["export"] = export.export_run(setup, last, given[last.model], results)
        results |= watch.report()
        plots.draw({folder.name: [runs.curves(folder)]}, folder / "plots")
        storage.write_json(folder / "results.json", results)
        stage.show(folder, results)
    if wandb_run is not None:
        wandb_run.finish()
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("end of the run")
    return results


def given_teachers(setup: Setup) -> dict[str, Params]:
    """The parameters of the teachers that no stage trains, by name."""
    names = [name for name in setup.teachers if name not in setup.trained]
    return {name: stage.given_params(setup, name) for name in names}


def check(setup: Setup) -> None:
    """Finds before the long work what a later stage would fail of."""
    texts = setup.task.examples(setup.task.splits[0]).pairs[0]
    for name, model in setup.models.items():
        check_types(name, model, setup.tokenizer_of(name), texts)
    given = {name: model.abstract().params for name, model in setup.models.items()}
    for this in setup.stages:
        for part in setup.parts(this, given):
            part.check()
        learning_rate(this.optim, this.steps)
        if this.name == "student" and setup.config.resume:
            loop.resume_from(setup.config.resume, this.steps).close()
        if this.learns:
            setup.weights_of(this)
            check_tokens(setup, this, setup.plan(this)[0].objective)


def run_stage(
    setup: Setup,
    this: Stage,
    given: dict[str, Params],
    answers: Answers,
    folder: epath.Path,
    split: str,
    wandb_run: Any = None,
) -> dict[str, Any]:
    """Trains a stage, or what is left of it; returns its figures on `split`. Its best parameters
    go into `given`, under the name of its model."""
    config, primary = setup.config, setup.tasks[this.model].primary
    plan, knobs = setup.plan(this)
    teacher, stream = teaching(setup, this, plan.objective, answers)

    def validate(student: Model) -> dict[str, float]:
        params = replacement.successors(student.params)
        found = held_out_figures(setup, this, params, answers, "validation")
        return {name: value for name, value in found.items() if isinstance(value, float)}

    every = config.eval.every or max(1, round(this.steps / max(1.0, this.epochs)))
    fitted = parts.train(
        setup.parts(this, given),
        stage=this.name,
        plan=plan,
        stream=stream,
        teacher=teacher,
        schedules=loop.Schedules(
            learning_rate(this.optim, this.steps),
            knobs.weights,
            knobs.temperatures,
            config.seed,
            setup.draws(this),
        ),
        validate=None if this.name == "intermediate" else validate,
        intervals=loop.Intervals(every, every, config.log.every),
        keep=config.checkpoint.keep,
        directory=folder / this.name,
        selection=loop.Selection(primary, larger=True, patience=config.patience),
        resume=config.resume if this.name == "student" else "",
        wandb_run=wandb_run,
    )
    given[this.model] = fitted.state.params["student"]

    def figures() -> dict[str, Any]:
        found = held_out_figures(setup, this, given[this.model], answers, split)
        if jax.process_index() == 0:
            curves = runs.curves(folder)[this.name]
            rows = epochs.table(curves.training, curves.validation)
            storage.write_json(folder / this.name / "epochs.json", rows)
        own = {"steps": fitted.steps, "best_step": fitted.best_step}
        return found | own | stage.speed(folder / this.name)

    return stage.kept(folder / this.name / "results.json", figures)


def held_out_figures(
    setup: Setup, this: Stage, params: Params, answers: Answers, split: str
) -> dict[str, Any]:
    """Figures of a stage's model on a split, beside its teachers' answers."""
    task = setup.tasks[this.model]
    if task.tunes(split):
        task = task.tuned(outputs_of(setup, this.model, params, "validation"))
    outputs = outputs_of(setup, this.model, params, split)
    return measure(task, outputs, split, answers_beside(setup, this, answers, split))


def outputs_of(setup: Setup, name: str, params: Params, split: str) -> list[np.ndarray]:
    """The logits of each row of a split, of a model that a stage trains."""
    processes = jax.process_index(), jax.process_count()
    rows = setup.tasks[name].held_out(split, setup.config.eval.batch_size, *processes)
    model = Model(params, setup.models[name].abstract().graphdef)
    found = predict(model, rows, setup.mesh, family.PARTITION)
    return [found[i] for i in range(len(found))]


def teacher_figures(setup: Setup, name: str, answers: Answers, split: str) -> dict[str, Any]:
    """Figures of a teacher that no stage trains."""
    task = setup.tasks[name]
    if task.tunes(split):
        task = task.tuned(answers.of(name, "validation"))
    return measure(task, answers.of(name, split), split)


def answers_beside(setup: Setup, this: Stage, answers: Answers, split: str) -> list | None:
    """What a stage is compared with: the answers of the teachers that it has, or would have."""
    if this.name in setup.teachers or setup.regression:
        return None
    return answers.together(
        setup.teachers_of(this), setup.weights_of(this), setup.config.average, split
    )


def measure(
    task: Any, outputs: list[np.ndarray], split: str, beside: list | None = None
) -> dict[str, Any]:
    """Figures of a model's answers: the task's, by class, and how near they are to a teacher's."""
    figures = task.score(split, outputs)
    if beside is not None:
        figures |= beside_teacher(outputs, beside)
    return figures | task.report(split, outputs)
