"""The models, tasks and tokenizers of a fine-tuning run; see setup.py.

Every model reads the examples with its own tokenizer, so each has a task of its own, over the same
examples.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from kd_jax import hub, plugins
from kd_jax.errors import UserError
from kd_jax.recipes import blueprint, keys, theseus
from kd_jax.recipes.blueprint import Blueprint
from kd_jax.recipes.setup import Setup
from kd_jax.recipes.stage import Stage, stages
from kd_jax.tasks import text
from kd_jax.teachers.several import SPACES

NOMINAL_STEPS = 1000  # of a stage whose length depends on data that is not read


class FinetuneSetup(Setup):
    """Classification, regression or answer spans; one or more teachers, perhaps an assistant."""

    def __init__(
        self,
        config: ConfigDict,
        folder: epath.Path | None = None,
        devices: list | None = None,
        platform: str | None = None,
    ):
        self.teachers = ("teacher", *config.get("teachers", {}))
        for name in self.teachers[1:]:
            if name in ("assistant", "baseline", "intermediate", "student", "teacher", "theseus"):
                raise UserError(f"config.teachers.{name}: a stage has this name; take another")
        have = {name: name for name in self.teachers}
        have |= {"assistant": "assistant", "baseline": "student"}
        have |= {"intermediate": "student", "theseus": "theseus", "student": "student"}
        self._have = have
        super().__init__(config, folder, devices, platform, have)
        make_task = plugins.load("tasks", config.task.name, "make").make
        self.task = make_task(config.task, config.data, None)
        self.head, self.regression = self.task.head, self.task.regression
        self.labels_only = {("mse" if self.regression else "ce"): {"weight": 1.0}}
        self.trained = {stage.model for stage in self.stages}
        self._tokenizers: dict[str, Any] = {}
        self.models = self._describe()
        self.tasks = dict.fromkeys(self.models, self.task)
        if folder is not None:
            self._tokenizers = self._read_tokenizers()
            self.models = self._describe()  # a tokenizer trained here has its size now
            for name in self.models:
                check_vocabulary(name, self.models[name], self._tokenizers[name])
                self.tasks[name] = self.task.with_tokenizer(self._tokenizers[name])
            self.task = self.tasks["student"]
        for name, model in self.models.items():
            if self.task.seq_len > model.config.max_tokens:
                raise UserError(
                    f"config.task.seq_len={self.task.seq_len}: {name} {model.name} has positions "
                    f"for {model.config.max_tokens} tokens; shorten the rows"
                )
        self._check_teachers()
        self.orders = {name: self._order(name) for name in self.models}
        self.stages = [self._with_steps(stage) for stage in self.stages]

    @property
    def split(self) -> str:
        """The split that the run reports."""
        return "test" if "test" in self.task.splits else "validation"

    @property
    def has_assistant(self) -> bool:
        """Whether the student learns from an assistant, which learns from the teachers."""
        return "assistant" in self.trained

    @property
    def has_intermediate(self) -> bool:
        """Whether the student goes on from a stage on config.intermediate."""
        return any(stage.name == "intermediate" for stage in self.stages)

    def objective_of(self, stage: Stage) -> Mapping[str, Any]:
        if stage.name == "intermediate":
            return self.config.intermediate
        return super().objective_of(stage)

    def tokenizer_of(self, model: str) -> Any:
        return self._tokenizers[model]

    def teachers_of(self, stage: Stage) -> tuple[str, ...]:
        if stage.name in ("intermediate", "student") and self.has_assistant:
            return ("assistant",)
        return self.teachers

    def weights_of(self, stage: Stage) -> list[float]:
        """The shares of a stage's teachers in their average; they sum to 1."""
        names = self.teachers_of(stage)
        if names == ("assistant",):
            return [1.0]
        weights = [float(self.section(name).weight) for name in names]
        if not sum(weights):
            raise UserError(f"the weights of {', '.join(names)} are all 0; set one above 0")
        return [weight / sum(weights) for weight in weights]

    def with_numbers(self, config: ConfigDict, folder: epath.Path) -> FinetuneSetup:
        """The same models and data under a config that differs in numbers of the training only."""
        keys.check(config)
        other = copy.copy(self)
        other.config, other.folder = config, folder
        other.stages = [other._with_steps(stage) for stage in stages(config, self._have)]
        return other

    def section(self, model: str) -> ConfigDict:
        return self.config.teachers[model] if model in self.config.teachers else self.config[model]

    def _describe(self) -> dict[str, Blueprint]:
        trained_size = None
        if self.config.tokenizer.train:
            own = self._tokenizers.get("student")
            trained_size = self.config.tokenizer.vocab_size if own is None else len(own)
        common = dict(
            head=self.head, policy=self.policy, vocab_size=trained_size, offline=self.folder is None
        )
        found: dict[str, Blueprint] = {}
        names = [*self.teachers, *(["assistant"] if self.has_assistant else []), "student"]
        for name in names:
            section = self.section(name)
            # A teacher that is taken as it is has classes of its own, in its own order.
            given = section.model and self._as_it_comes(name) and self.folder is not None
            unknown = self.folder is None and self.task.labels_in_data
            labels = None if given or unknown or self.head == "span" else self.task.labels
            base = None if name in self.teachers else found["teacher"].hf_json
            remat = self.config.remat and name not in self.teachers
            found[name] = blueprint.describe(
                section, self._key(name), base=base, labels=labels, remat=remat, **common
            )
        if "theseus" in self.trained:
            own = theseus.successor(self.config.theseus, found["teacher"], self.config.remat)
            if labels is not None:  # the student's, which are the task's
                own = dataclasses.replace(
                    own, config=dataclasses.replace(own.config, labels=labels)
                )
            found["theseus"] = own
        return found

    def _read_tokenizers(self) -> dict[str, Any]:
        """Each model's: trained here, its checkpoint's own, the config's, or the teacher's."""
        given, found = self.config.tokenizer, {}
        if given.train:
            own = self._trained_tokenizer(lambda: self.task.texts("train"))
            return dict.fromkeys(self.models, own)
        named = None
        if given.path:
            where = Path(given.path).expanduser()
            named = text.load_tokenizer(
                where if where.is_dir() else hub.resolve(given.path, None, "tokenizer.path").path
            )
        for name, model in self.models.items():
            own = model.folder is not None and text.has_tokenizer(model.folder)
            found[name] = text.load_tokenizer(model.folder) if own else named
            if found[name] is None and "teacher" in found and name not in self.teachers:
                found[name] = found["teacher"]
            if found[name] is None:
                raise UserError(f"{name} {model.name} has no tokenizer: set tokenizer.path")
        return found

    def _as_it_comes(self, name: str) -> bool:
        """Whether it is a teacher that no stage trains."""
        return name in self.teachers and name not in self.trained

    def _check_teachers(self) -> None:
        average = self.config.average
        if average not in SPACES:
            raise UserError(f"config.average={average!r}: have {', '.join(SPACES)}")
        if self.regression and len(self.teachers) > 1 and average == "probabilities":
            raise UserError("config.average='probabilities': a regression has none; take logits")
        for name in self.teachers:
            if self.section(name).labels and not self._as_it_comes(name):
                raise UserError(
                    f"config.{self._key(name)}.labels: a stage trains {name}, on the task's own "
                    f"classes; leave them out"
                )

    def _key(self, name: str) -> str:
        """Where the config describes a model."""
        return f"teachers.{name}" if name in self.config.teachers else name

    def _order(self, name: str) -> tuple[int, ...] | None:
        if self.head == "span" or self.regression or self.folder is None:
            return None
        model, stated = self.models[name], self.section(name).get("labels", None)
        where = f"config.{self._key(name)}.labels"
        return class_order(model.name, stated, model.config.labels, self.task.labels, where)

    def _with_steps(self, stage: Stage) -> Stage:
        if stage.steps > 0:
            return stage
        if stage.epochs <= 0:
            raise UserError(f"stage {stage.name}: set config.epochs, or config.steps")
        if self.folder is None:
            return dataclasses.replace(stage, steps=NOMINAL_STEPS)
        stream = self.tasks[stage.model].train(stage.batch_size, self.config.seed)
        steps = max(1, round(stage.epochs * stream.steps_per_epoch))
        return dataclasses.replace(stage, steps=steps)


def check_vocabulary(name: str, model: Blueprint, tokenizer: Any) -> None:
    """Raises UserError where a model has fewer tokens than the tokenizer that it reads with."""
    size = max(tokenizer.get_vocab().values()) + 1
    if model.config.vocab_size < size:
        raise UserError(
            f"{name} {model.name} has a vocabulary of {model.config.vocab_size}, its tokenizer "
            f"has ids up to {size - 1}: they do not belong together; check the tokenizer files "
            f"in its folder, or tokenizer.path"
        )


def check_types(name: str, model: Blueprint, tokenizer: Any, texts: Sequence[str]) -> None:
    """Raises UserError where the tokenizer gives a row of `texts`, a text or a pair, token types
    that the model has no embeddings for."""
    have = getattr(model.config, "num_types", 0)  # 0: the family does not look at them
    most = max(tokenizer(*texts, verbose=False).get("token_type_ids", [0]))
    if 0 < have <= most:
        raise UserError(
            f"{name} {model.name} has {have} token types (type_vocab_size), its tokenizer gives "
            f"pairs of texts the types 0 to {most}: they do not belong together; check the "
            f"tokenizer files in its folder, or tokenizer.path"
        )


def class_order(
    model: str,
    stated: Sequence[str] | None,
    labels: Sequence[str],
    task: Sequence[str],
    where: str,
) -> tuple[int, ...] | None:
    """Where each of the task's classes stands among a model's; None where they agree.

    Args:
        model: its name, for messages.
        stated: names that the user gives to the model's classes, in its own order.
        labels: the names that its config.json has.
        task: the task's classes.
        where: the setting of `stated`, for messages.

    Raises UserError where the classes are not the same, or have no names (LABEL_0).
    """
    theirs = tuple(stated or labels)
    if not len(theirs) == len(labels) == len(task):
        raise UserError(
            f"{model} has {len(labels)} classes ({', '.join(labels)}), the task {len(task)} "
            f"({', '.join(task)}){f', {where} {len(theirs)}' if stated else ''}"
        )
    if theirs == tuple(task):
        return None
    folded = [name.casefold() for name in theirs]
    if {name.casefold() for name in task} != set(folded):
        raise UserError(
            f"{model} calls its classes {', '.join(theirs)}, the task {', '.join(task)}: give the "
            f"model's class names, in its own order, in {where}"
        )
    return tuple(folded.index(name.casefold()) for name in task)
