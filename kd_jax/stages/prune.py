"""Prunes a decoder by L1 norms (kd_jax/models/compact.py), once, and fine-tunes what is left.

The least important heads and FFN columns go. The figures of the pruned model before any fine-tuning
are those of `one_shot`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
from etils import epath

from kd_jax import storage
from kd_jax.models import compact, shapes
from kd_jax.models.blueprint import count
from kd_jax.run import stage
from kd_jax.run.run import Run
from kd_jax.run.stage import Final, Given, Settings, Stage, born
from kd_jax.stages import substitute, swaps
from kd_jax.train import sharding
from kd_jax.train.state import TrainState
from kd_jax.types import Params

SECTION = "pruning"


def make(run: Run, name: str, settings: Settings) -> Stage:
    """The stage that fine-tunes the pruned teacher."""
    teacher, file = run.models["teacher"], _file(run)
    swaps.check_decoder(teacher, f"teacher {teacher.name}")
    if file is not None and file.exists():
        _describe(run, name, shapes.read(storage.read_json(file)["blocks"]))
    else:  # as many parameters, however the layers share them
        _pruned(run, name, teacher.abstract().params)
    as_small = not run.config.pruning.target and substitute.SECTION in run.config
    return stage.make(
        run,
        settings,
        model=name,
        made="pruned with kd_jax, by heads and FFN columns of the smallest L1 norm, and then "
        "trained on",
        learns=run.config.pruning.distil and bool(settings.objective),
        starts=lambda given: {"one_shot": pruned(run, name, given)},
        phases_of=lambda run, this, given: [Final(run, this, lambda _: _born(run, this, given))],
        prepare=swaps.prepare(run, settings) if as_small else None,
    )


def _file(run: Run) -> epath.Path | None:
    """What keeps the shapes that pruning came to."""
    return None if run.folder is None else run.folder / "pruned.json"


def _target(run: Run) -> float:
    """The share of all parameters that is pruned away."""
    target = run.config.pruning.target
    if target or substitute.SECTION not in run.config:
        return target
    whole = count(run.models["teacher"].abstract().params)
    return 1 - swaps.of(run)[-1].parameters / whole


def _pruned(run: Run, name: str, params: Params) -> Params:
    """The original's parameters, pruned; what is left is described as the model `name`."""
    teacher = run.models["teacher"]
    model = teacher.abstract().replace(params=params)
    how = _target(run), run.config.pruning.ranking
    model, config = compact.prune(model, teacher.family, teacher.config, *how)
    _describe(run, name, [config.shape(layer) for layer in range(config.num_layers)])
    return model.params


def _describe(run: Run, name: str, blocks: Sequence[shapes.BlockShape]) -> None:
    teacher = run.models["teacher"]
    config = dataclasses.replace(teacher.config, remat=run.config.remat)
    model = dataclasses.replace(
        teacher,
        name=f"{teacher.name}, pruned",
        config=compact.with_blocks(config, blocks),
        folder=None,
        commit=None,
    )
    run.add(name, model)


def pruned(run: Run, name: str, given: Given) -> Params:
    """The pruned parameters, on the host."""
    params = _pruned(run, name, sharding.to_host(given["teacher"]))
    if jax.process_index() == 0:
        config = run.models[name].config
        blocks = [config.shape(layer) for layer in range(config.num_layers)]
        storage.write_json(_file(run), {"blocks": shapes.write(blocks)})
    return params


def _born(run: Run, this: Stage, given: Given) -> TrainState:
    """The first state, of the pruned parameters."""
    return born(run, this, run.models[this.model], (), pruned(run, this.model, given))
