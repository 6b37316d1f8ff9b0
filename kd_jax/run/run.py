"""Builds a run: its mesh, types, models, tokenizers, tasks and stages, top-down and each once.

Building finds mistakes before any long work. Differences between language modelling and fine-tuning
are in the task (tasks/task.py), differences between stages in their kinds (kd_jax/stages).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from kd_jax import config as defaults
from kd_jax import plugins
from kd_jax.errors import UserError
from kd_jax.models.blueprint import Blueprint
from kd_jax.precision import Policy, policy_for
from kd_jax.run import models
from kd_jax.run.settings import Settings, kind_of, read
from kd_jax.run.stage import Parameters, Stage
from kd_jax.tasks.task import Task
from kd_jax.train import sharding
from kd_jax.types import Params

NOMINAL_STEPS = 100_000  # of a stage whose length depends on data that is not read


@dataclasses.dataclass
class Run:
    """A run: everything that its stages share."""

    config: ConfigDict
    folder: epath.Path | None  # None: all is abstract, without data, weights or network
    mesh: Mesh
    policy: Policy
    head: str  # of all models: mlm | clm | classification | span
    teachers: tuple[str, ...]  # the names of those in the config
    models: dict[str, Blueprint]
    tokenizers: dict[str, Any]  # by model; {} where all is abstract
    tasks: dict[str, Task]  # by model, whose tokenizer each has; for language models all are one
    settings: list[Settings]  # of the stages
    stages: list[Stage] = dataclasses.field(default_factory=list)
    # What kinds of stages found out about the run's models, for all stages of theirs.
    shared: dict[Any, Any] = dataclasses.field(default_factory=dict)
    made: set[str] = dataclasses.field(default_factory=set)  # names of models made by stages

    @property
    def principal(self) -> Stage:
        """Returns the main stage of the run, which is planned and exported."""
        return next((stage for stage in self.stages if stage.principal), self.stages[-1])

    @property
    def task(self) -> Task:
        """Returns the task, with the tokenizer of the last stage's model."""
        return self.tasks.get(self.settings[-1].model, self.tasks["teacher"])

    @property
    def split(self) -> str:
        """Names the split on which the run reports metrics."""
        return "test" if self.task.data["test"] else "validation"

    @property
    def chunk(self) -> int:
        """Returns for how many rows logits over a vocabulary are computed at once; 0: chosen
        automatically."""
        return self.config.get("vocab_chunk", 0)

    @property
    def trained(self) -> set[str]:
        """Names the models that stages train."""
        return {each.model for each in self.settings}

    @property
    def processes(self) -> dict[str, int]:
        """Returns this process's index and the number of processes."""
        return dict(process_index=jax.process_index(), process_count=jax.process_count())

    def stage(self, name: str) -> Stage | None:
        """Finds a stage by its name; None if there is none."""
        return next((stage for stage in self.stages if stage.name == name), None)

    def ready(self, name: str, parameters: Parameters) -> Stage:
        """Finds a stage by its name, after measuring the importance that its model depends on."""
        if measure := self.stage(name).measure_first:
            measure(parameters)
            self.make_stages()
        return self.stage(name)

    def section(self, model: str) -> ConfigDict:
        """Finds the section of the config that describes a model."""
        return models.section_of(self.config, model)

    def order(self, model: str) -> tuple[int, ...] | None:
        """Finds the index of each of the task's classes among a model's; None if orders agree."""
        described, task = self.models[model], self.tasks[model]
        if self.folder is None or not task.labels or task.regression:
            return None
        stated = self.section(model).get("labels") if model in self.teachers else None
        where = f"config.{models.key_of(self.config, model)}.labels"
        own = described.config.labels
        return models.class_order(described.name, stated, own, task.labels, where)

    def weights(self, teachers: Sequence[str]) -> list[float]:
        """Reads the weights of teachers in their average; they sum to 1."""
        if len(teachers) == 1 and teachers[0] not in self.teachers:
            return [1.0]
        weights = [float(self.section(name).get("weight", 1.0)) for name in teachers]
        if not sum(weights):
            raise UserError(f"the weights of {', '.join(teachers)} are all 0; set one above 0")
        return [weight / sum(weights) for weight in weights]

    def add(self, name: str, model: Blueprint) -> None:
        """Adds a model that a stage makes from the teacher; it uses the teacher's tokenizer."""
        self.models[name], self.tasks[name] = self.labelled(model), self.tasks["teacher"]
        self.made.add(name)
        if self.tokenizers:
            self.tokenizers[name] = self.tokenizers["teacher"]

    def labelled(self, model: Blueprint) -> Blueprint:
        """Adds to the description of a model the task's classes, in the task's order, and how its
        texts are read (`Task.noted_in`)."""
        task = self.tasks["teacher"]
        config = task.noted_in(model.config)
        if task.labels and not (self.folder is None and task.labels_in_data):
            config = dataclasses.replace(config, labels=task.labels)
        return dataclasses.replace(model, config=config)

    def original(self, parameters: Parameters) -> Params:
        """Returns the teacher's parameters for a model that is made from it, with classes in the
        task's order."""
        params, order = parameters["teacher"], self.order("teacher")
        if order is None:
            return params
        classifier = {key: x[..., list(order)] for key, x in params["head"]["classifier"].items()}
        return params | {"head": params["head"] | {"classifier": classifier}}

    def make_stages(self) -> None:
        """Makes the stages; again after a measurement that their models depend on."""
        self.settings = [self._timed(each) for each in self.settings]
        self.stages = [kind_of(each.kind).make(self, each.name, each) for each in self.settings]

    def changed(self, config: ConfigDict, folder: epath.Path) -> Run:
        """Makes a run with the same models and data from a config that differs only in numbers of
        the training."""
        defaults.check(config)
        settings = read(config, self.teachers)
        other = dataclasses.replace(
            self, config=config, folder=folder, settings=settings, stages=[], shared={}
        )
        other.models, other.tasks = dict(self.models), dict(self.tasks)
        other.make_stages()
        return other

    def _timed(self, settings: Settings) -> Settings:
        """Converts epochs to steps in the settings of a stage, or steps to epochs of its data."""
        if settings.steps <= 0 and "epochs" not in self.config:
            raise UserError(f"config.stages.{settings.name}.steps={settings.steps}: at least 1")
        if settings.steps <= 0 and settings.epochs <= 0:
            raise UserError(f"stage {settings.name}: set config.epochs, or config.steps")
        if "epochs" not in self.config:
            return settings
        if self.folder is None:
            return dataclasses.replace(settings, steps=max(settings.steps, 0) or NOMINAL_STEPS)
        task = self.tasks.get(settings.model, self.tasks["teacher"])
        an_epoch = task.train(settings.batch_size, self.config.seed).steps_per_epoch
        if settings.steps > 0:
            return dataclasses.replace(settings, epochs=settings.steps / an_epoch)
        return dataclasses.replace(settings, steps=max(1, round(settings.epochs * an_epoch)))


def build(
    config: ConfigDict,
    folder: epath.Path | None = None,
    devices: list | None = None,
    platform: str | None = None,
) -> Run:
    """Builds the run of a config.

    Args:
        config: the config of a training recipe.
        folder: the run directory; None: everything stays abstract.
        devices: the devices to plan for; by default this process's.
        platform: the platform to plan for; by default this process's.

    Raises UserError for mistakes in the config, the models or their tokenizers.
    """
    defaults.check(config)
    teachers = models.names_of_teachers(config)
    for name in teachers[1:]:
        if name in defaults.STAGES:
            raise UserError(f"config.teachers.{name}: a stage has this name; take another")
    mesh = sharding.make_mesh(config.mesh.fsdp, devices, config.mesh.model)
    settings = read(config, teachers)
    for each in settings:
        _check_rows(mesh, each.batch_size, config.accumulate, f"batch size of {each.name}")
    _check_rows(mesh, config.eval.batch_size, 1, "eval.batch_size")
    if "rollout" in config:
        _check_rows(mesh, config.rollout.held_out, 1, "rollout.held_out")
    policy = policy_for(config.precision, platform or jax.default_backend(), config.mesh.reduction)
    task = plugins.load("tasks", config.task.name, "make").make(config.task, config.data, None)
    without = {"vector": "an embedder", "regression": "a regression"}.get(task.outputs)
    if without and len(teachers) > 1 and config.average == "probabilities":
        raise UserError(f"config.average='probabilities': {without} has none; take logits")
    trained = {each.model for each in settings}
    # A run that makes a model of the teacher may have no student.
    if not any(each.makes_model for each in settings):
        trained.add("student")
    described, tokenizers = models.read(config, folder, task, policy, trained)
    tasks = dict.fromkeys(described, task)
    if task.of_examples:
        tasks = {name: task.with_tokenizer(own) for name, own in tokenizers.items()} or tasks
    elif tokenizers:
        tasks = dict.fromkeys(described, task.with_tokenizer(tokenizers["teacher"]))
    run = Run(
        config, folder, mesh, policy, task.head, teachers, described, tokenizers, tasks, settings
    )
    for name, model in described.items():
        if tasks[name].seq_len > model.config.max_tokens:
            raise UserError(
                f"config.task.seq_len={tasks[name].seq_len}: {name} {model.name} has positions "
                f"for {model.config.max_tokens} tokens; shorten the rows"
            )
        run.order(name)
        models.check_heads(name, model, config.mesh.model)
    run.make_stages()
    return run


def _check_rows(mesh: Mesh, rows: int, accumulate: int, what: str) -> None:
    parts = sharding.num_parts(mesh) * accumulate
    if rows <= 0 or rows % parts:
        raise UserError(
            f"{what}: {rows} rows cannot be divided among {parts // accumulate} devices x "
            f"{accumulate} micro-batches; make it a multiple of {parts}"
        )
