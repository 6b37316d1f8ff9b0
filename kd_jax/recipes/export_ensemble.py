"""Writes an ensemble as Hugging Face folders: each member, and all of them as one model; checked
like every export (export.py)."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kd_jax.evals import card, quantities
from kd_jax.models import hf_ensemble
from kd_jax.recipes import export, export_check
from kd_jax.recipes.ensemble_setup import EnsembleSetup
from kd_jax.recipes.stage import count
from kd_jax.teachers.several import average
from kd_jax.types import Batch, Params


def export_run(
    setup: EnsembleSetup,
    members: Sequence[Params],
    weights: Sequence[float],
    results: dict[str, Any],
) -> dict[str, Any]:
    """Writes RUN/export/member_N, from 1, and RUN/export/ensemble, of members on the host. Returns
    what `export.export_model` does, of the ensemble, and "members": their paths."""
    paths = [
        _member(setup, params, number, results)["path"] for number, params in enumerate(members, 1)
    ]
    return _whole(setup, members, weights, results) | {"members": paths}


def _member(setup: EnsembleSetup, params: Params, number: int, results: dict) -> dict[str, Any]:
    name, blueprint = f"member_{number}", setup.models["student"]
    page = _page(setup, name, quantities.count(count(params)) + " parameters", results, "")
    source = {"config_hash": results["config_hash"], "stage": name}
    out = setup.folder / "export" / name
    origins = _folders(setup)
    return export.export_model(blueprint, params, setup.tokenizer, out, page, source, *origins)


def _whole(setup, members, weights, results) -> dict[str, Any]:
    blueprint, space = setup.models["student"], setup.config.ensemble.space
    size = f"{len(members)} models, {quantities.count(sum(map(count, members)))} parameters"
    page = _page(setup, "ensemble", size, results, hf_ensemble.MODELING_FILE.name)

    def write(folder: Path) -> dict[str, float]:
        hf_ensemble.save(folder, members, weights, space, blueprint.family, blueprint.config)

        def mean(batch: Batch) -> np.ndarray:
            logits = [export_check.logits_of(blueprint, params, batch) for params in members]
            return average(logits, list(weights), space, np)

        batch = export_check.example_of(blueprint)
        return export_check.check_in_pytorch(folder, "clm", batch, mean)

    source = {"config_hash": results["config_hash"], "stage": "ensemble"}
    out = setup.folder / "export" / "ensemble"
    return export.publish(write, setup.tokenizer, out, page, source, *_folders(setup))


def _page(setup: EnsembleSetup, name: str, size: str, results: dict, code: str) -> export.Page:
    config = json.loads(setup.config.to_json())
    stated = card.inherited(*_folders(setup))
    return functools.partial(card.of_stage, name, "clm", size, results, config, stated, code)


def _folders(setup: EnsembleSetup) -> tuple[Path | None, ...]:
    return setup.models["student"].folder, setup.models["teacher"].folder
