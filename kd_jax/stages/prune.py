"""Prunes the teacher once by L1 norms (kd_jax/models/compact.py), and fine-tunes the pruned model.

The least important heads and FFN columns are removed. The metrics of the pruned model before any
fine-tuning are reported as `one_shot`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
from etils import epath

from kd_jax import storage
from kd_jax.models import compact, model_config
from kd_jax.models.blueprint import count
from kd_jax.run import models, stage
from kd_jax.run.run import Run
from kd_jax.run.settings import Settings
from kd_jax.run.stage import Parameters, Stage, first_state, last_phase
from kd_jax.stages import substitute, swaps
from kd_jax.train import sharding
from kd_jax.types import Params

SECTION = "pruning"


def make(run: Run, name: str, settings: Settings) -> Stage:
    """Makes the stage that fine-tunes the pruned teacher."""
    teacher, file = run.models["teacher"], _file(run)
    swaps.check_blocks(teacher, f"teacher {teacher.name}")
    if file is not None and file.exists():
        blocks = model_config.read_blocks(storage.read_json(file)["blocks"])
    else:  # as many parameters, however the layers share them
        _, blocks = _pruned(run, teacher.abstract().params)
    _describe(run, name, blocks)
    return stage.make(
        run,
        settings,
        model=name,
        made="pruned with kd_jax, by heads and FFN columns of the smallest L1 norm, and then "
        "trained on",
        learns=run.config.pruning.distil and bool(settings.objective),
        reports_start="one_shot",
        phases_of=lambda run, this, parameters: [
            last_phase(run, this, lambda _: first_state(run, this, pruned(run, name, parameters)))
        ],
        measure_first=swaps.measure_first(run, settings) if _as_small(run) else None,
    )


def _file(run: Run) -> epath.Path | None:
    """Finds the file that keeps the shapes that pruning came to."""
    return None if run.folder is None else run.folder / "pruned.json"


def _as_small(run: Run) -> bool:
    """Tells whether the model becomes as small as the one that substitution ends with."""
    return not run.config.pruning.target and substitute.SECTION in run.config


def _pruned(run: Run, params: Params) -> tuple[Params, list[model_config.BlockShape]]:
    """Prunes the teacher's parameters: returns what is left, and the shapes of its blocks."""
    settings, teacher = run.config.pruning, run.models["teacher"]
    model, share = teacher.abstract().replace(params=params), settings.target
    if _as_small(run):
        share = 1 - swaps.of(run)[-1].parameters / count(params)
    model, config = compact.prune(model, teacher.family, teacher.config, share, settings.ranking)
    return model.params, [config.shape(layer) for layer in range(config.num_layers)]


def _describe(run: Run, name: str, blocks: Sequence[model_config.BlockShape]) -> None:
    teacher = run.models["teacher"]
    config = dataclasses.replace(teacher.config, **models.execution(run.config))
    config = compact.with_blocks(config, blocks)
    run.add(name, teacher.changed(f"{teacher.name}, pruned", config))


def pruned(run: Run, name: str, parameters: Parameters) -> Params:
    """Prunes the teacher's parameters on the host, and writes the resulting shapes to a file."""
    params, blocks = _pruned(run, sharding.to_host(run.original(parameters)))
    _describe(run, name, blocks)
    if jax.process_index() == 0:
        storage.write_json(_file(run), {"blocks": model_config.write_blocks(blocks)})
    return params
