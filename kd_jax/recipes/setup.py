"""What the stages of a run share: mesh, types, task, tokenizers, models as described, and checks.

Building a Setup finds the mistakes that can be found before any long work. `TextSetup` is that of
language models; the one of fine-tuning is in finetune_setup.py.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from kd_jax import hub, plugins
from kd_jax.data import source
from kd_jax.errors import UserError
from kd_jax.models import family
from kd_jax.objectives import combine
from kd_jax.precision import policy_for
from kd_jax.recipes import blueprint, keys, operations, theseus, workdir
from kd_jax.recipes.blueprint import Blueprint
from kd_jax.recipes.parts import Part, Whole
from kd_jax.recipes.stage import Groups, Stage, stages
from kd_jax.tasks import text
from kd_jax.train import sharding, step
from kd_jax.train.loop import Replacement
from kd_jax.types import Batch, Model, Params

log = logging.getLogger(__name__)


class Setup:
    """With a `folder`, a run; without, everything stays abstract: no data, weights or network.

    `devices` and `platform` are those to plan for, this process's own by default. Subclasses set
    `models` (name -> Blueprint), `task`, `head` and `labels_only`, the objective without a teacher.
    """

    models: dict[str, Blueprint]
    task: Any
    head: str
    labels_only: Mapping[str, Any]
    regression = False
    chunk = 0  # rows of logits that exist at a time

    def __init__(
        self,
        config: ConfigDict,
        folder: epath.Path | None,
        devices: list | None,
        platform: str | None,
        have: Mapping[str, str],
    ):
        """`have`: the stages there may be, in their order, each with the model it trains."""
        keys.check(config)
        self.config, self.folder = config, folder
        self.mesh = sharding.make_mesh(config.mesh.fsdp, devices)
        self.stages = stages(config, have)
        for stage in self.stages:
            self._check_rows(stage.batch_size, config.accumulate, f"batch size of {stage.name}")
        self._check_rows(config.eval.batch_size, 1, "eval.batch_size")
        self.policy = policy_for(config.precision, platform or jax.default_backend())

    @property
    def principal(self) -> Stage:
        """The stage that the run is about: what is planned, and exported."""
        return self.stages[-1]

    def parts(self, stage: Stage, given: Mapping[str, Params]) -> Sequence[Part]:
        """The parts of a stage; `given`: the models that are there already, perhaps abstract."""
        if stage.name == "theseus":
            return [theseus.Replacing(self, stage, given), theseus.Alone(self, stage)]
        return [Whole(self, stage, given)]

    def table(self) -> list[dict[str, Any]]:
        """What the planned stage does to its model on the way, a row for each change."""
        return []

    def effort(self, stage: Stage, given: Mapping[str, Params]) -> dict[str, Any]:
        """Figures of what a stage's training takes."""
        parts = self.parts(stage, given)
        flops = operations.of_parts(self, stage, parts)
        return {"steps": stage.steps, "training_flops": flops}

    def prepare(self, stage: Stage, given: Mapping[str, Params]) -> None:
        """Settles what of a stage depends on the models that are there before it."""

    def starts(self, stage: Stage, given: Mapping[str, Params]) -> Mapping[str, Params]:
        """What a stage starts from that is worth figures of its own, by their name."""
        return {}

    def groups(self, stage: Stage) -> Groups:
        """Parameters of a stage's last state that have Adam counts of their own."""
        return theseus.groups(self, stage) if stage.name == "theseus" else ()

    def draws(self, stage: Stage) -> Replacement | None:
        """What a stage draws at every step, besides dropout."""
        return theseus.draws(self, stage) if stage.name == "theseus" else None

    has_intermediate = False  # whether the student goes on from a stage of its own

    def beside(self, stage: Stage, frozen: Model, batch: Batch) -> tuple[Any, Batch]:
        """What answers in a step of the stage, and the batch as it is given; abstract. `frozen` is
        the teacher."""
        return frozen, batch

    def answering(self, stage: Stage) -> list[Params]:
        """The parameters, abstract, of the models that answer in every step of the stage."""
        return [self.models["teacher"].abstract().params] if stage.learns else []

    def section(self, model: str) -> ConfigDict:
        """The section of the config that describes a model."""
        return self.config[model]

    def tokenizer_of(self, model: str) -> Any:
        """The tokenizer that a model reads with."""
        raise NotImplementedError

    def objective_of(self, stage: Stage) -> Mapping[str, Any]:
        """The terms that a stage is trained on."""
        return self.config.objective if stage.learns else self.labels_only

    def teachers_of(self, stage: Stage) -> tuple[str, ...]:
        """The models that a stage learns from, where it does; the first one's states are seen."""
        return ("teacher",)

    def plan(self, stage: Stage) -> tuple[step.Plan, combine.Knobs]:
        """The static part of a stage's step, and its schedules of weights and temperatures."""
        objective, knobs = combine.build(
            self.objective_of(stage),
            stage.steps,
            self.policy,
            self.policy if stage.learns else None,
            self.chunk,
            regression=self.regression,
            accuracy=self.head in ("classification", "span"),
        )
        return step.Plan(objective, self.mesh, family.PARTITION, self.config.accumulate), knobs

    def describe_machine(self) -> str:
        """Devices, types and attention, as a line."""
        kind = f"{self.mesh.size} x {self.mesh.devices.flat[0].device_kind}"
        attention = self.policy.attention
        attention += "" if attention == "explicit" else ", explicit where it has dropout"
        return f"{kind}, {self.config.precision}, attention: {attention}"

    def _check_rows(self, rows: int, accumulate: int, what: str) -> None:
        parts = self.mesh.size * accumulate
        if rows <= 0 or rows % parts:
            raise UserError(
                f"{what}: {rows} rows cannot be divided among {self.mesh.size} devices x "
                f"{accumulate} micro-batches; make it a multiple of {parts}"
            )

    def _trained_tokenizer(self, read: Callable[[], Iterable[str]]) -> Any:
        """The run's own tokenizer, trained on what `read` gives where it is not there yet."""
        given, folder = self.config.tokenizer, self.folder / "tokenizer"
        if "://" in os.fspath(folder):
            raise UserError(
                f"tokenizer.train={given.train!r} needs a local --workdir, not {self.folder}: "
                f"train it there once, and set tokenizer.path to its folder"
            )
        if jax.process_index() == 0 and not folder.exists():
            temporary = folder.with_name("tokenizer.tmp")
            text.train_tokenizer(given.train, read(), given.vocab_size, temporary)
            (temporary / workdir.TRAINED_HERE).touch()
            temporary.rename(folder)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("tokenizer")
        try:
            return text.load_tokenizer(folder)
        except Exception as error:  # whatever a damaged file leads to
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{folder} is damaged ({reason}): remove it, and it is trained again"
            ) from error


class TextSetup(Setup):
    """Language models: one tokenizer for all, rows of one length."""

    labels_only = {"ce": {"weight": 1.0}}
    have: Mapping[str, str] = {"teacher": "teacher", "baseline": "student", "student": "student"}

    def __init__(self, config, folder=None, devices=None, platform=None):
        super().__init__(config, folder, devices, platform, self.have)
        self.chunk = config.vocab_chunk
        for stage in self.stages:
            if stage.steps < 1:
                raise UserError(f"config.stages.{stage.name}.steps={stage.steps}: at least 1")
        make_task = plugins.load("tasks", config.task.name, "make").make
        self.head = make_task(config.task, config.data, None).head
        self.models = self._describe()
        self.tokenizer = None if folder is None else self._tokenizer()
        if self.tokenizer is not None:
            self.models = self._describe(len(self.tokenizer))
            self._check_vocabulary()
        self.task = make_task(config.task, config.data, self.tokenizer)
        for key, model in self.models.items():
            if self.task.seq_len > model.config.max_tokens:
                raise UserError(
                    f"config.task.seq_len={self.task.seq_len}: {key} {model.name} has positions "
                    f"for {model.config.max_tokens} tokens; shorten the rows"
                )

    def tokenizer_of(self, model: str) -> Any:
        return self.tokenizer

    def held_out_plan(self, beside_teacher: bool) -> step.Plan:
        """The eval step's: loss and accuracy, and KL and agreement beside a teacher."""
        teacher_policy = self.policy if beside_teacher else None
        objective = combine.held_out(self.policy, teacher_policy, self.chunk)
        return step.Plan(objective, self.mesh, family.PARTITION)

    def shapes(self) -> list[str]:
        """The programs of the run and the shapes they are compiled for, as lines."""
        lines = [self.describe_machine()]
        for stage in self.stages:
            batch = self.task.shapes(stage.batch_size)
            lines.append(f"train_step {stage.name}: {_shape(batch)}, x{self.config.accumulate}")
        lines.append(f"eval_step: {_shape(self.task.shapes(self.config.eval.batch_size))}")
        return lines

    def _describe(self, vocab_size: int | None = None) -> dict[str, Blueprint]:
        config, offline = self.config, self.folder is None
        own = config.tokenizer.train and (vocab_size or config.tokenizer.vocab_size)
        common = dict(head=self.head, policy=self.policy, vocab_size=own or None, offline=offline)
        teacher = blueprint.describe(config.teacher, "teacher", **common)
        student = blueprint.describe(
            config.student, "student", base=teacher.hf_json, remat=config.remat, **common
        )
        return {"teacher": teacher, "student": student}

    def _tokenizer(self):
        """The run's tokenizer: trained here, of a folder or hub id, or the teacher's."""
        given, teacher = self.config.tokenizer, self.models["teacher"]
        if given.train:
            return self._trained_tokenizer(
                lambda: source.read(self.config.data.train, "data.train")
            )
        if given.path:
            where = Path(given.path).expanduser()
            where = (
                where if where.is_dir() else hub.resolve(given.path, None, "tokenizer.path").path
            )
        elif teacher.folder is not None:
            where = teacher.folder
        else:
            raise UserError("set tokenizer.path, tokenizer.train, or teacher.model")
        return text.load_tokenizer(where)

    def _check_vocabulary(self) -> None:
        """One tokenizer for both: vocabularies may differ in padding rows only."""
        size = max(self.tokenizer.get_vocab().values()) + 1
        for key, model in self.models.items():
            if model.config.vocab_size < size:
                raise UserError(
                    f"{key} {model.name} has a vocabulary of {model.config.vocab_size}, the "
                    f"tokenizer has ids up to {size - 1}: teacher and student must share the "
                    f"tokenizer; set tokenizer.path to that of {model.name}, or choose another"
                )
        for key, model in self.models.items():
            if model.folder is None or not text.has_tokenizer(model.folder):
                continue
            theirs = text.load_tokenizer(model.folder)
            if theirs.get_vocab() != self.tokenizer.get_vocab():
                raise UserError(
                    f"{key} {model.name} was trained with another tokenizer than the run's: the "
                    f"same ids would mean other words; choose teacher and student of one vocabulary"
                )
            if not text.same_rules(theirs, self.tokenizer):
                log.warning(
                    "%s %s was trained on texts that its tokenizer cut otherwise than the run's",
                    key,
                    model.name,
                )


def _shape(batch) -> str:
    supervised = "x".join(map(str, batch.labels.shape))
    return f"tokens {'x'.join(map(str, batch.tokens_BT.shape))}, labels {supervised}"
