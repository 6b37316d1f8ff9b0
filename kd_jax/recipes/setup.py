"""What the stages of a run share: mesh, tokenizer, task, models as described, and their checks.

Building a Setup finds the mistakes that can be found before any long work.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from kd_jax import plugins
from kd_jax.data import source
from kd_jax.data.settings import settings
from kd_jax.errors import UserError
from kd_jax.models import family, hub
from kd_jax.objectives import combine
from kd_jax.precision import policy_for
from kd_jax.recipes import blueprint, keys
from kd_jax.tasks import text
from kd_jax.train import sharding, step

STAGES = ("teacher", "baseline", "student")
_LABELS_ONLY = {"ce": {"weight": 1.0}}
_OVERRIDES = ("steps", "batch_size", "optim")


@dataclasses.dataclass(frozen=True)
class Stage:
    """The settings of one stage: the config's own, and what `config.stages` says differs."""

    name: str
    steps: int
    batch_size: int
    optim: ConfigDict
    objective: Any


def stages(config: ConfigDict) -> list[Stage]:
    """The stages in their order. Raises UserError on unknown names and keys."""
    if not config.stages or set(config.stages) - set(STAGES):
        raise UserError(f"config.stages={list(config.stages)}: have {', '.join(STAGES)}")
    found = []
    for name in STAGES:
        if name not in config.stages:
            continue
        defaults = {key: config[key] for key in _OVERRIDES}
        changes = settings(config.stages[name], defaults, f"stages.{name}")
        optim = ConfigDict(config.optim.to_dict(), type_safe=False)
        if changes["optim"] is not config.optim:
            optim.update(changes["optim"])
            keys.check_optim(optim, f"stages.{name}.optim")
        if changes["steps"] < 1:
            raise UserError(f"config.stages.{name}.steps={changes['steps']} must be at least 1")
        objective = config.objective if name == "student" else _LABELS_ONLY
        found.append(Stage(name, **changes | {"optim": optim, "objective": objective}))
    return found


class Setup:
    """With a `folder`, a run; without, everything stays abstract: no data, weights or network.

    `devices` and `platform` are those to plan for, this process's own by default.
    """

    def __init__(
        self,
        config: ConfigDict,
        folder: epath.Path | None = None,
        devices: list | None = None,
        platform: str | None = None,
    ):
        keys.check(config)
        self.config, self.folder = config, folder
        self.mesh = sharding.make_mesh(config.mesh.fsdp, devices)
        self.stages = stages(config)
        for stage in self.stages:
            self._check_rows(stage.batch_size, config.accumulate, f"batch size of {stage.name}")
        self._check_rows(config.eval.batch_size, 1, "eval.batch_size")
        self.policy = policy_for(config.precision, platform or jax.default_backend())
        make_task = plugins.load("tasks", config.task.name, "make").make
        self.head = make_task(config.task, config.data, None).head
        teacher, student = self._describe()
        self.tokenizer = None if folder is None else self._tokenizer(teacher)
        if self.tokenizer is not None:
            teacher, student = self._describe(len(self.tokenizer))
            self._check_vocabulary(teacher, student)
        self.teacher, self.student = teacher, student
        self.task = make_task(config.task, config.data, self.tokenizer)
        for model, key in ((teacher, "teacher"), (student, "student")):
            if self.task.seq_len > model.config.max_tokens:
                raise UserError(
                    f"config.task.seq_len={self.task.seq_len}: {key} {model.name} has positions "
                    f"for {model.config.max_tokens} tokens; shorten the rows"
                )

    def plan(self, stage: Stage) -> tuple[step.Plan, combine.Knobs]:
        """The static part of a stage's step, and its schedules of weights and temperatures."""
        teacher_policy = self.policy if stage.name == "student" else None
        objective, knobs = combine.build(
            stage.objective, stage.steps, self.policy, teacher_policy, self.config.vocab_chunk
        )
        return step.Plan(objective, self.mesh, family.PARTITION, self.config.accumulate), knobs

    def held_out_plan(self, beside_teacher: bool) -> step.Plan:
        """The eval step's: loss and accuracy, and KL and agreement beside a teacher."""
        teacher_policy = self.policy if beside_teacher else None
        objective = combine.held_out(self.policy, teacher_policy, self.config.vocab_chunk)
        return step.Plan(objective, self.mesh, family.PARTITION)

    def shapes(self) -> list[str]:
        """The programs of the run and the shapes they are compiled for, as lines."""
        kind = f"{self.mesh.size} x {self.mesh.devices.flat[0].device_kind}"
        attention = self.policy.attention
        attention += "" if attention == "explicit" else ", explicit where it has dropout"
        lines = [f"{kind}, {self.config.precision}, attention: {attention}"]
        for stage in self.stages:
            batch = self.task.shapes(stage.batch_size)
            lines.append(f"train_step {stage.name}: {_shape(batch)}, x{self.config.accumulate}")
        lines.append(f"eval_step: {_shape(self.task.shapes(self.config.eval.batch_size))}")
        return lines

    def _check_rows(self, rows: int, accumulate: int, what: str) -> None:
        parts = self.mesh.size * accumulate
        if rows <= 0 or rows % parts:
            raise UserError(
                f"{what}: {rows} rows cannot be divided among {self.mesh.size} devices x "
                f"{accumulate} micro-batches; make it a multiple of {parts}"
            )

    def _describe(self, vocab_size: int | None = None):
        config, offline = self.config, self.folder is None
        own = config.tokenizer.train and (vocab_size or config.tokenizer.vocab_size)
        common = dict(head=self.head, policy=self.policy, vocab_size=own or None, offline=offline)
        teacher = blueprint.describe(config.teacher, "teacher", **common)
        student = blueprint.describe(
            config.student, "student", base=teacher.hf_json, remat=config.remat, **common
        )
        return teacher, student

    def _tokenizer(self, teacher: blueprint.Blueprint):
        """The run's tokenizer: trained here, of a folder or hub id, or the teacher's."""
        given, folder = self.config.tokenizer, self.folder / "tokenizer"
        if not given.train:
            if given.path:
                where = Path(given.path).expanduser()
                where = where if where.is_dir() else hub.resolve(given.path).path
            elif teacher.folder is not None:
                where = teacher.folder
            else:
                raise UserError("set tokenizer.path, tokenizer.train, or teacher.model")
            return text.load_tokenizer(where)
        if jax.process_index() == 0 and not folder.exists():
            documents = source.read(self.config.data.train, "data.train")
            temporary = folder.with_name("tokenizer.tmp")
            text.train_tokenizer(given.train, documents, given.vocab_size, temporary)
            temporary.rename(folder)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("tokenizer")
        return text.load_tokenizer(folder)

    def _check_vocabulary(self, teacher, student) -> None:
        """One tokenizer for both: vocabularies may differ in padding rows only."""
        size = max(self.tokenizer.get_vocab().values()) + 1
        for model, key in ((teacher, "teacher"), (student, "student")):
            if model.config.vocab_size < size:
                raise UserError(
                    f"{key} {model.name} has a vocabulary of {model.config.vocab_size}, the "
                    f"tokenizer has ids up to {size - 1}: teacher and student must share the "
                    f"tokenizer; set tokenizer.path to that of {model.name}, or choose another"
                )
        for model, key in ((teacher, "teacher"), (student, "student")):
            if model.folder is None or not text.has_tokenizer(model.folder):
                continue
            theirs = text.load_tokenizer(model.folder).get_vocab()
            if theirs != self.tokenizer.get_vocab():
                raise UserError(
                    f"{key} {model.name} was trained with another tokenizer than the run's: the "
                    f"same ids would mean other words; choose teacher and student of one vocabulary"
                )


def _shape(batch) -> str:
    supervised = "x".join(map(str, batch.labels.shape))
    return f"tokens {'x'.join(map(str, batch.tokens_BT.shape))}, labels {supervised}"
