"""Writes an ensemble as Hugging Face folders: each member, and all of them as one model; checked
like every export (export.py)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kd_jax.models import hf
from kd_jax.models.blueprint import count
from kd_jax.recipes import export, export_check
from kd_jax.report import card, quantities
from kd_jax.run import provenance, workdir
from kd_jax.run.run import Run
from kd_jax.teachers.several import average
from kd_jax.types import Batch, Params


def export_run(
    run: Run,
    members: Sequence[Params],
    weights: Sequence[float],
    results: dict[str, Any],
) -> dict[str, Any]:
    """Writes RUN/export/member_N, from 1, and RUN/export/ensemble, of members on the host. Returns
    what `export.export_model` does, of the ensemble, and "members": their paths."""
    paths = [
        _member(run, params, number, results)["path"] for number, params in enumerate(members, 1)
    ]
    return _whole(run, members, weights, results) | {"members": paths}


def _member(run: Run, params: Params, number: int, results: dict) -> dict[str, Any]:
    name, blueprint = f"member_{number}", run.models["student"]
    size = quantities.count(count(params)) + " parameters"
    page, trained_on = _about(run, name, size, results, "")
    source = {"config_hash": results["config_hash"], "stage": name}
    out = run.folder / "export" / name
    origins = _folders(run)
    return export.export_model(
        blueprint, params, run.tokenizers["student"], out, page, source, trained_on, *origins
    )


def _whole(run: Run, members, weights, results) -> dict[str, Any]:
    blueprint, space = run.models["student"], run.config.ensemble.space
    size = f"{len(members)} models, {quantities.count(sum(map(count, members)))} parameters"
    page, trained_on = _about(run, "ensemble", size, results, hf.ENSEMBLE_FILE.name)

    def write(folder: Path) -> dict[str, float]:
        hf.save_ensemble(folder, members, weights, space, blueprint.family, blueprint.config)

        def mean(batch: Batch) -> np.ndarray:
            logits = [export_check.logits_of(blueprint, params, batch) for params in members]
            return average(logits, list(weights), space, np)

        batch = export_check.example_of(blueprint)
        return export_check.check_in_pytorch(folder, "clm", batch, mean)

    source = {"config_hash": results["config_hash"], "stage": "ensemble"}
    out = run.folder / "export" / "ensemble"
    origins = _folders(run)
    return export.publish(write, run.tokenizers["student"], out, page, source, trained_on, *origins)


def _about(
    run: Run, name: str, size: str, results: dict, code: str
) -> tuple[export.Page, provenance.Provenance]:
    """The model card, and what goes into kd_jax.json."""
    config = workdir.resolved(run.config)
    stated = card.inherited(*_folders(run))
    trained_on = provenance.of_run(config, results, run.tokenizers["student"])
    rows = provenance.sentence(trained_on["task"])
    page = functools.partial(
        card.of_stage, name, "clm", size, results, config, stated, rows, "", code
    )
    return page, trained_on


def _folders(run: Run) -> tuple[Path | None, ...]:
    return run.models["student"].folder, run.models["teacher"].folder
