"""The models and stages of a comparison of ways to make one decoder smaller; see setup.py.

`substitute` starts from the teacher's own parameters, so the model that it makes is described by
its schedule (phases.py) and not by a section of the config.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from kd_jax.errors import UserError
from kd_jax.models.decoder_config import DecoderConfig
from kd_jax.recipes import operations, ordering, phases, theseus
from kd_jax.recipes.parts import Part
from kd_jax.recipes.phases import Phase
from kd_jax.recipes.pruning_setup import PruningSetup
from kd_jax.recipes.stage import Groups, Stage, count
from kd_jax.recipes.swap import Substituted, groups
from kd_jax.types import Params


class SubstitutionSetup(PruningSetup):
    """Decoders, made smaller by the substitution of blocks, or by pruning; `student` is a model of
    fixed shape."""

    have = {
        "teacher": "teacher",
        "substitute": "substitute",
        "prune": "prune",
        "theseus": "theseus",
        "student": "student",
    }

    def make_models(self) -> None:
        config, names = self.config, [each.name for each in self.stages]
        # Without a shape of its own the student has the one that substitution ends with.
        self.alike = not (config.student.model or config.student.architecture)
        self.phases: list[Phase] = []
        self.known = True  # the order in which blocks go
        as_small = "prune" in names and not config.pruning.target
        drawn = "theseus" in names and not config.theseus.group
        if "substitute" in names or as_small or drawn or (self.alike and "student" in names):
            measured = None
            if self.folder is not None and config.substitution.order == "importance":
                measured = ordering.written(self._importance_file)
            self._settle(measured)
        if "theseus" in names:
            how = config.theseus, self.models["teacher"], config.remat
            self.models["theseus"] = self.phases[-1].model if drawn else theseus.successor(*how)
        super().make_models()

    @property
    def pruning_target(self) -> float:
        whole = count(self.models["teacher"].abstract().params)
        return self.config.pruning.target or 1 - self.phases[-1].parameters / whole

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
        if not isinstance(teacher.config, DecoderConfig):
            raise UserError(
                f"config.theseus.group=0: teacher {teacher.name} is no decoder, and other models "
                f"have no compact blocks; set it to how many blocks one replaces"
            )
        original = dataclasses.replace(
            teacher, config=dataclasses.replace(teacher.config, remat=self.config.remat)
        )
        self.known = importance is not None or settings.order != "importance"
        blocks = phases.order(settings, original.config.num_layers, importance)
        self.phases = phases.schedule(settings, original, blocks, self.principal.steps)
        self.models["substitute"] = self.phases[-1].model
        if self.alike and "student" in self.models:
            self.models["student"] = self.phases[-1].model

    def table(self) -> list[dict[str, Any]]:
        """A row for each phase: its steps, the blocks that become compact (None: which of them is
        not known yet), what is left then."""
        if self.principal.name != "substitute":
            return []
        whole = count(self.models["teacher"].abstract().params)
        return [
            {
                "phase": phase.number,
                "steps": [phase.start + 1, phase.end],
                "blocks": list(phase.layers) if self.known else None,
                "parameters": phase.parameters,
                "reduction_percent": round(100 * (1 - phase.parameters / whole), 2),
            }
            for phase in self.phases
        ]

    def effort(self, stage: Stage, given: Mapping[str, Params]) -> dict[str, Any]:
        found, steps = super().effort(stage, given), self.config.substitution.fit_steps
        if stage.name == "substitute" and steps:
            found["fit_steps"] = steps * len(self.phases)
            for phase in self.phases:
                found["training_flops"] += operations.of_regression(self, stage, phase, steps)
        return found

    def prepare(self, stage: Stage, given: Mapping[str, Params]) -> None:
        settings = self.config.substitution
        if self.known or stage.name == "teacher":
            return
        batches, rows = settings.importance_batches, stage.batch_size
        found = ordering.importance(self, given["teacher"], batches, rows)
        ordering.write(self._importance_file, found)
        self._settle(found)

    def parts(self, stage: Stage, given: Mapping[str, Params]) -> Sequence[Part]:
        if stage.name == "substitute":
            return [Substituted(self, stage, phase, given) for phase in self.phases]
        if stage.name == "student" and self.alike and self.config.student.init == "teacher":
            return [Substituted(self, stage, phases.at_once(self.phases), given, ordinary=True)]
        return super().parts(stage, given)

    def groups(self, stage: Stage) -> Groups:
        if stage.name != "substitute":
            return super().groups(stage)
        return groups(self, stage, self.phases[-1])
