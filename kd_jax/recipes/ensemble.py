"""Trains a sequential ensemble: each round adds a student, trained so that the mean of its logits
with those of the frozen members matches the teacher.

"Distilling Large Language Models into Small LM Ensembles" (slm_ensembles, a PyTorch system). Here a
step costs the same in every round: all rounds read the same rows of text, in another order; the
teacher's logits for them are computed once, the members' mean once a round (run/text_logits.py).
config.ensemble and config.rounds: see kd_jax/stages/round.py.

A round is finished if its folder RUN/round_N has results.json.
"""

from __future__ import annotations

import contextlib
import logging
import time
from typing import Any

import jax
from ml_collections import ConfigDict

from kd_jax import storage
from kd_jax.errors import UserError
from kd_jax.recipes import export
from kd_jax.report import runs
from kd_jax.run import results as kept
from kd_jax.run import stage
from kd_jax.run.run import Run, build
from kd_jax.run.stage import abstract_state
from kd_jax.run.teaching import given_params
from kd_jax.run.workdir import RunDirectory
from kd_jax.stages.round import Rounds, training_flops
from kd_jax.train import sharding
from kd_jax.train.checkpoint import Checkpoints
from kd_jax.types import Params

log = logging.getLogger(__name__)


def run(config: ConfigDict, place: RunDirectory) -> dict[str, Any]:
    """Runs, or continues, the run in `place` and returns its results (see results.json)."""
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
    place.begin(built, data)
    found, members = [], list(past)
    with place.listening(config) as listeners:
        training = Rounds(built, teacher, listeners)
        for number in range(1, config.rounds + 1):
            params, figures = training.run(number, members)
            members.append(params)
            found.append(figures)
            if jax.process_index() == 0:
                from kd_jax.report import pictures  # with matplotlib, slow to import

                pictures.write_rounds(folder, training.of_teacher, found)
    weights, learned = training.weights(members)
    found[-1]["ensemble"] |= {
        "steps": config.rounds * this.steps,
        "training_flops": training_flops(built, this, len(past)),
    }
    last = {"student": found[-1]["student"], "ensemble": found[-1]["ensemble"]}
    last |= {"learned": learned} if learned else {}
    results = place.about(built, data) | {
        "roles": {"teacher": "teacher", "student": "ensemble"},
        "stages": {"teacher": training.of_teacher} | last,
        "weights": weights,
        "rounds": found,
        "trend": _trend(found),
    }
    members = [sharding.gathered(params) for params in members]
    if jax.process_index() == 0:
        results["export"] = export.export_ensemble(built, members, weights, results)
        results["seconds"] = round(time.time() - began, 1)
        storage.write_json(folder / "results.json", results)
        kept.show(folder, results)
    kept.together("end of the run")
    return results


def _trend(found: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Fits the ensemble's loss and KL against its size; {} for fewer than three rounds."""
    from kd_jax.report import pictures  # with matplotlib, which takes half a second to import

    sizes = [each["members"] for each in found]
    made = {
        name: pictures.trend(sizes, [each["ensemble"][name] for each in found])
        for name in ("loss", "kl")
    }
    return {name: each for name, each in made.items() if each}


def past_members(this: Run) -> list[Params]:
    """Reads the members of the runs in config.ensemble.past_run_dirs, in order of their training.

    Raises UserError naming the run, or its round, that cannot be used.
    """
    found, where = [], "config.ensemble.past_run_dirs"
    like = abstract_state(this, this.principal)
    for folder in this.config.ensemble.past_run_dirs:
        run = runs.read(folder)
        if "rounds" not in run.results:
            raise UserError(f"{where}: {folder} is no run of an ensemble")
        theirs = run.results["models"]["student"]["name"]
        for number in range(1, len(run.results["rounds"]) + 1):
            round_ = run.workdir / f"round_{number}"
            with contextlib.closing(Checkpoints(round_ / "checkpoints", keep=None)) as checkpoints:
                if checkpoints.best is None:
                    raise UserError(f"{where}: {round_} has no checkpoint")
                if not checkpoints.fits(checkpoints.best, like):
                    raise UserError(
                        f"{where}: {round_} holds a {theirs}, which does not fit the student of "
                        f"this run; members have one architecture"
                    )
                found.append(checkpoints.restore(checkpoints.best, like).params["student"])
    return found
