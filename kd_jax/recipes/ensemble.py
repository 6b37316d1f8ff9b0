"""Sequential ensembles: round after round a new student is trained so that its mean with the frozen
members before it meets the teacher; then it joins them.

"Distilling Large Language Models into Small LM Ensembles" (slm_ensembles, a PyTorch system). Here a
step costs the same in every round: all rounds read the same rows of text, in another order; what
the teacher says of them is computed once, and the members' mean once a round (stages/recall.py).
config.ensemble and config.rounds: see kd_jax/stages/round.py.

A round that is done has results.json in its folder RUN/round_N; nothing else says so.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from kd_jax import storage
from kd_jax.errors import UserError
from kd_jax.recipes import export
from kd_jax.report import pictures, runs
from kd_jax.run import results as kept
from kd_jax.run import stage, workdir
from kd_jax.run.answers import given_params
from kd_jax.run.run import Run, build
from kd_jax.run.stage import abstract_state
from kd_jax.run.workdir import RunDirectory
from kd_jax.stages.round import training_flops
from kd_jax.stages.rounds import Rounds
from kd_jax.train import sharding
from kd_jax.train.checkpoint import Checkpoints
from kd_jax.types import Params

log = logging.getLogger(__name__)


def run(config: ConfigDict, place: RunDirectory) -> dict[str, Any]:
    """Runs what is left of the run in `place` and returns its results (see results.json)."""
    began, folder = time.time(), place.folder
    if results := kept.finished(folder):
        return results
    built = build(config, folder)
    this = built.principal
    if len(built.stages) > 1:
        raise UserError(f"config.stages={list(config.stages)}: an ensemble has one, {this.name}")
    stage.create_state(built, this, {}, abstract=True)
    past = past_members(built)
    teacher = given_params(built, "teacher")
    data = built.task.prepare()
    place.begin(config, built, data)
    for line in built.shapes():
        log.info("%s", line)
    wandb_run = workdir.open_wandb(config, folder)
    training = Rounds(built, teacher, wandb_run)
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
        "training_flops": training_flops(built, this, len(past)),
    }
    results = place.about(config) | {
        "models": {k: {"name": m.name, "commit": m.commit} for k, m in built.models.items()},
        "data": data,
        "split": built.split,
        "stages": _stages(training.of_teacher, found[-1], learned),
        "weights": weights,
        "rounds": found,
        "trend": _trend(found),
    }
    members = [sharding.to_host(params) for params in members]
    if jax.process_index() == 0:
        results["export"] = export.export_ensemble(built, members, weights, results)
        results["seconds"] = round(time.time() - began, 1)
        storage.write_json(folder / "results.json", results)
        kept.show(folder, results)
    if wandb_run is not None:
        wandb_run.finish()
    kept.together("end of the run")
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


def past_members(this: Run) -> list[Params]:
    """The members of config.ensemble.past_run_dirs, in the order in which they were trained.

    Raises UserError naming the run, or the round of it, that cannot be taken.
    """
    found = []
    for folder in this.config.ensemble.past_run_dirs:
        run = runs.read(folder)
        if "rounds" not in run.results:
            raise UserError(f"config.ensemble.past_run_dirs: {folder} is no run of an ensemble")
        theirs = run.results["models"]["student"]["name"]
        for number in range(1, len(run.results["rounds"]) + 1):
            found.append(_member(this, run.workdir / f"round_{number}", theirs))
    return found


def _member(this: Run, folder: epath.Path, theirs: str) -> Params:
    checkpoints = Checkpoints(folder / "checkpoints", keep=None)
    if checkpoints.best is None:
        raise UserError(f"config.ensemble.past_run_dirs: {folder} has no checkpoint")
    like = abstract_state(this, this.principal)
    try:
        if not checkpoints.fits(checkpoints.best, like):
            raise UserError(
                f"config.ensemble.past_run_dirs: {folder} holds a {theirs}, which does not fit "
                f"the student of this run; members have one architecture"
            )
        return checkpoints.restore(checkpoints.best, like).params["student"]
    finally:
        checkpoints.close()
