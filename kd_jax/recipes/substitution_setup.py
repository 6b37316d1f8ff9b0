"""The models and stages of a comparison of ways to make one decoder smaller; see setup.py.

`substitute` starts from the teacher's own parameters, so the model that it makes is described by
its schedule (phases.py) and not by a section of the config.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from kd_jax.errors import UserError
from kd_jax.models.decoder_config import DecoderConfig
from kd_jax.recipes import ordering, phases
from kd_jax.recipes.parts import Part
from kd_jax.recipes.phases import Phase
from kd_jax.recipes.setup import TextSetup
from kd_jax.recipes.stage import Groups, Stage
from kd_jax.recipes.swap import Substituted, groups
from kd_jax.types import Params


class SubstitutionSetup(TextSetup):
    """Decoders, made smaller by the substitution of blocks; `student` is a model of fixed shape."""

    have = {"teacher": "teacher", "substitute": "substitute", "student": "student"}
    compares_with_teacher = True

    def __init__(self, config, folder=None, devices=None, platform=None):
        super().__init__(config, folder, devices, platform)
        teacher, names = self.models["teacher"], [each.name for each in self.stages]
        if not isinstance(teacher.config, DecoderConfig):
            raise UserError(
                f"teacher {teacher.name} is no decoder, and other models have no compact blocks; "
                f"take a causal language model"
            )
        if "student" not in names:
            del self.models["student"]
        # Without a shape of its own the student has the one that substitution ends with.
        self.alike = not (config.student.model or config.student.architecture)
        self.phases: list[Phase] = []
        if "substitute" in names or (self.alike and "student" in names):
            known = None
            if folder is not None and config.substitution.order == "importance":
                known = ordering.written(self._importance_file)
            self._settle(known)

    @property
    def principal(self) -> Stage:
        return next((each for each in self.stages if each.name == "substitute"), self.stages[-1])

    @property
    def _importance_file(self):
        return self.folder / "importance.json"

    def _settle(self, importance: Sequence[float] | None) -> None:
        """Fixes the phases; without an importance that is wanted, as if the last blocks went first,
        which has the same sizes where all blocks are alike."""
        settings, teacher = self.config.substitution, self.models["teacher"]
        original = dataclasses.replace(
            teacher, config=dataclasses.replace(teacher.config, remat=self.config.remat)
        )
        blocks = phases.order(settings, original.config.num_layers, importance)
        self.phases = phases.schedule(settings, original, blocks, self.principal.steps)
        self.models["substitute"] = self.phases[-1].model
        if self.alike and "student" in self.models:
            self.models["student"] = self.phases[-1].model

    def prepare(self, stage: Stage, given: Mapping[str, Params]) -> None:
        settings = self.config.substitution
        if not self.phases or stage.name == "teacher" or settings.order != "importance":
            return
        if ordering.written(self._importance_file) is None:
            batches, rows = settings.importance_batches, stage.batch_size
            found = ordering.importance(self, given["teacher"], batches, rows)
            ordering.write(self._importance_file, found)
            self._settle(found)

    def parts(self, stage: Stage, given: Mapping[str, Params]) -> Sequence[Part]:
        if stage.name == "substitute":
            return [Substituted(self, stage, phase, given) for phase in self.phases]
        if stage.name == "student" and self.alike and self.config.student.init == "teacher":
            return [Substituted(self, stage, phases.at_once(self.phases), given, grouped=False)]
        return super().parts(stage, given)

    def groups(self, stage: Stage) -> Groups:
        if stage.name != "substitute":
            return super().groups(stage)
        return groups(self, stage, self.phases[-1])
