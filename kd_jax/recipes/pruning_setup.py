"""Models and stages of recipes that make a decoder smaller; the stage `prune`. See setup.py.

Structured L1 pruning (kd_jax/models/compact.py), once, then fine-tuning. config.pruning:

    target    share of all parameters that goes; in the recipe `substitute` 0 is what goes there
    ranking   global | layer: heads and FFN columns compete with those of all layers, or their own
    distil    fine-tuned on config.objective beside the original, or on the labels alone
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import jax

from kd_jax import storage
from kd_jax.errors import UserError
from kd_jax.models import compact, shapes
from kd_jax.models.blueprint import Blueprint
from kd_jax.models.decoder_config import DecoderConfig
from kd_jax.recipes import stage
from kd_jax.recipes.parts import Part
from kd_jax.recipes.setup import TextSetup
from kd_jax.recipes.stage import Stage
from kd_jax.train import sharding
from kd_jax.train.state import TrainState
from kd_jax.types import Params


class PruningSetup(TextSetup):
    """A decoder and what pruning makes of it."""

    have = {"teacher": "teacher", "prune": "prune"}

    def __init__(self, config, folder=None, devices=None, platform=None):
        super().__init__(config, folder, devices, platform)
        teacher, names = self.models["teacher"], [each.name for each in self.stages]
        if not isinstance(teacher.config, DecoderConfig) and {*names} - {"teacher", "theseus"}:
            raise UserError(
                f"teacher {teacher.name} is no decoder, and other models have no compact blocks; "
                f"take a causal language model"
            )
        if "student" not in names:
            del self.models["student"]
        if not config.pruning.distil:
            self.stages = [
                dataclasses.replace(each, learns=each.learns and each.name != "prune")
                for each in self.stages
            ]
        self.make_models()

    def make_models(self) -> None:
        """Describes the models that stages make of the original."""
        if not any(each.name == "prune" for each in self.stages):
            return
        if self.folder is not None and self._shapes_file.exists():
            found = storage.read_json(self._shapes_file)
            self._describe_pruned(shapes.read(found["blocks"]))
        else:  # as many parameters, however the layers share them
            self._prune(self.models["teacher"].abstract().params)

    @property
    def pruning_target(self) -> float:
        """The share of all parameters that is pruned away."""
        return self.config.pruning.target

    @property
    def _shapes_file(self):
        return self.folder / "pruned.json"

    def _prune(self, params: Params) -> Params:
        """The original's parameters, pruned; what is left is described as the model `prune`."""
        teacher = self.models["teacher"]
        model = teacher.abstract().replace(params=params)
        how = self.pruning_target, self.config.pruning.ranking
        model, config = compact.prune(model, teacher.family, teacher.config, *how)
        self._describe_pruned([config.shape(layer) for layer in range(config.num_layers)])
        return model.params

    def _describe_pruned(self, blocks: Sequence[shapes.BlockShape]) -> None:
        teacher = self.models["teacher"]
        config = dataclasses.replace(teacher.config, remat=self.config.remat)
        self.models["prune"] = dataclasses.replace(
            teacher,
            name=f"{teacher.name}, pruned",
            config=compact.with_blocks(config, blocks),
            folder=None,
            commit=None,
        )

    def pruned(self, given: Mapping[str, Params]) -> Params:
        """The pruned parameters, on the host."""
        params = self._prune(sharding.to_host(given["teacher"]))
        if jax.process_index() == 0:
            config = self.models["prune"].config
            blocks = [config.shape(layer) for layer in range(config.num_layers)]
            storage.write_json(self._shapes_file, {"blocks": shapes.write(blocks)})
        return params

    def starts(self, stage: Stage, given: Mapping[str, Params]) -> Mapping[str, Params]:
        if stage.name != "prune":
            return super().starts(stage, given)
        return {"one_shot": self.pruned(given)}

    def parts(self, stage: Stage, given: Mapping[str, Params]) -> Sequence[Part]:
        if stage.name != "prune":
            return super().parts(stage, given)
        return [Pruned(self, stage, given)]


@dataclasses.dataclass(frozen=True)
class Pruned:
    """The stage `prune`, in one part (parts.Part)."""

    setup: PruningSetup
    stage: Stage
    given: Mapping[str, Params]

    start = 0

    @property
    def end(self) -> int:
        return self.stage.steps

    @property
    def _model(self) -> Blueprint:
        return self.setup.models["prune"]

    def check(self) -> None:
        self.abstract()

    def abstract(self) -> TrainState:
        return stage.abstract_state(self.setup, self.stage)

    def enter(self, before: TrainState | None) -> TrainState:
        params = self.setup.pruned(self.given)
        return stage.born(self.setup, self.stage, self._model, (), params)
