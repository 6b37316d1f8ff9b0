"""Sequential ensembles: round after round a new student is trained so that its mean with the frozen
members before it meets the teacher; then it joins them.

"Distilling Large Language Models into Small LM Ensembles" (slm_ensembles, a PyTorch system). Here a
step costs the same in every round: all rounds read the same rows of text, in another order; what
the teacher says of them is computed once, and the members' mean once a round (recall.py).
config.ensemble and config.rounds: see ensemble_setup.py.

A round that is done has results.json in its folder RUN/round_N; nothing else says so.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from typing import Any

import jax
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from kd_jax import storage
from kd_jax.evals import pictures
from kd_jax.recipes import export_ensemble, operations, stage, workdir
from kd_jax.recipes.ensemble_setup import EnsembleSetup as Setup
from kd_jax.recipes.past import past_members
from kd_jax.recipes.rounds import Rounds
from kd_jax.recipes.workdir import RunDirectory
from kd_jax.schedules import learning_rate
from kd_jax.train import sharding

log = logging.getLogger(__name__)


def run(config: ConfigDict, place: RunDirectory) -> dict[str, Any]:
    """Runs what is left of the run in `place` and returns its results (see results.json)."""
    began, folder = time.time(), place.folder
    if results := stage.finished(folder):
        return results
    setup = Setup(config, folder)
    this = setup.principal
    stage.create_state(setup, this, {}, abstract=True)
    learning_rate(this.optim, this.steps)
    past = past_members(setup)
    teacher = stage.given_params(setup, "teacher")
    data = setup.task.prepare()
    place.begin(config, setup, data)
    for line in setup.shapes():
        log.info("%s", line)
    wandb_run = workdir.open_wandb(config, folder)
    training = Rounds(setup, teacher, wandb_run)
    found, members = [], list(past)
    for number in range(1, config.rounds + 1):
        params, figures = training.run(number, members)
        members.append(params)
        found.append(figures)
        if jax.process_index() == 0:
            pictures.write_rounds(folder, training.of_teacher, found)
    weights, learned = training.weights(members)
    found[-1]["ensemble"] |= {
        "steps": config.rounds * this.steps,
        "training_flops": operations.of_ensemble(setup, this, len(past)),
    }
    results = place.about(config) | {
        "models": {k: {"name": m.name, "commit": m.commit} for k, m in setup.models.items()},
        "data": data,
        "split": setup.reported,
        "stages": _stages(training.of_teacher, found[-1], learned),
        "weights": weights,
        "rounds": found,
        "trend": _trend(found),
    }
    members = [sharding.to_host(params) for params in members]
    if jax.process_index() == 0:
        results["export"] = export_ensemble.export_run(setup, members, weights, results)
        results["seconds"] = round(time.time() - began, 1)
        storage.write_json(folder / "results.json", results)
        stage.show(folder, results)
    if wandb_run is not None:
        wandb_run.finish()
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("end of the run")
    return results


def _stages(
    teacher: dict[str, Any], last: dict[str, Any], learned: dict[str, Any] | None
) -> dict[str, dict[str, Any]]:
    """Teacher, the last student alone, and the ensemble, as other recipes report their stages."""
    found = {"teacher": teacher, "student": last["student"], "ensemble": last["ensemble"]}
    return found | ({"learned": learned} if learned else {})


def _trend(found: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Of the ensemble's loss and KL over its size; {} for fewer than three rounds."""
    sizes = [each["members"] for each in found]
    made = {
        name: pictures.trend(sizes, [each["ensemble"][name] for each in found])
        for name in ("loss", "kl")
    }
    return {name: dataclasses.asdict(each) for name, each in made.items() if each is not None}
