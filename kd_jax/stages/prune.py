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
from kd_jax.models import compact, shapes
from kd_jax.models.blueprint import count
from kd_jax.run import stage
from kd_jax.run.run import Run
from kd_jax.run.stage import Parameters, Settings, Stage, first_state, last_phase
from kd_jax.stages import substitute, swaps
from kd_jax.train import sharding
from kd_jax.types import Params

SECTION = "pruning"


def make(run: Run, name: str, settings: Settings) -> Stage:
    """Makes the stage that fine-tunes the pruned teacher."""
    teacher, file = run.models["teacher"], _file(run)
    swaps.check_blocks(teacher, f"teacher {teacher.name}")
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
        reports_start="one_shot",
        phases_of=lambda run, this, parameters: [
            last_phase(run, this, lambda _: first_state(run, this, pruned(run, name, parameters)))
        ],
        measure_first=swaps.measure_first(run, settings) if as_small else None,
    )


def _file(run: Run) -> epath.Path | None:
    """Returns the path of the file with the pruned model's shapes."""
    return None if run.folder is None else run.folder / "pruned.json"


def _target(run: Run) -> float:
    """Computes the share of all parameters to prune."""
    target = run.config.pruning.target
    if target or substitute.SECTION not in run.config:
        return target
    whole = count(run.models["teacher"].abstract().params)
    return 1 - swaps.of(run)[-1].parameters / whole


def _pruned(run: Run, name: str, params: Params) -> Params:
    """Prunes the teacher's parameters, and adds the pruned model to the run as `name`."""
    teacher = run.models["teacher"]
    model = teacher.abstract().replace(params=params)
    how = _target(run), run.config.pruning.ranking
    model, config = compact.prune(model, teacher.family, teacher.config, *how)
    _describe(run, name, [config.shape(layer) for layer in range(config.num_layers)])
    return model.params


def _describe(run: Run, name: str, blocks: Sequence[shapes.BlockShape]) -> None:
    teacher = run.models["teacher"]
    config = dataclasses.replace(teacher.config, remat=run.config.remat)
    config = compact.with_blocks(config, blocks)
    run.add(name, teacher.changed(f"{teacher.name}, pruned", config))


def pruned(run: Run, name: str, parameters: Parameters) -> Params:
    """Prunes the teacher's parameters on the host, and writes the resulting shapes to a file."""
    params = _pruned(run, name, sharding.to_host(run.original(parameters)))
    if jax.process_index() == 0:
        config = run.models[name].config
        blocks = [config.shape(layer) for layer in range(config.num_layers)]
        storage.write_json(_file(run), {"blocks": shapes.write(blocks)})
    return params
