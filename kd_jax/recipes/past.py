"""Members of runs that are over, which come before those of a new one."""

from __future__ import annotations

from kd_jax.errors import UserError
from kd_jax.evals import runs
from kd_jax.recipes.ensemble_setup import EnsembleSetup
from kd_jax.recipes.stage import abstract_state
from kd_jax.train.checkpoint import Checkpoints
from kd_jax.types import Params


def past_members(setup: EnsembleSetup) -> list[Params]:
    """The members of config.ensemble.past_run_dirs, in the order in which they were trained.

    Raises UserError naming the run, or the round of it, that cannot be taken.
    """
    found = []
    for folder in setup.config.ensemble.past_run_dirs:
        run = runs.read(folder)
        if "rounds" not in run.results:
            raise UserError(f"config.ensemble.past_run_dirs: {folder} is no run of an ensemble")
        theirs = run.results["models"]["student"]["name"]
        for number in range(1, len(run.results["rounds"]) + 1):
            found.append(_member(setup, run.workdir / f"round_{number}", theirs))
    return found


def _member(setup, folder, theirs) -> Params:
    checkpoints = Checkpoints(folder / "checkpoints", keep=None)
    if checkpoints.best is None:
        raise UserError(f"config.ensemble.past_run_dirs: {folder} has no checkpoint")
    like = abstract_state(setup, setup.principal)
    try:
        if not checkpoints.fits(checkpoints.best, like):
            raise UserError(
                f"config.ensemble.past_run_dirs: {folder} holds a {theirs}, which does not fit "
                f"the student of this run; members have one architecture"
            )
        return checkpoints.restore(checkpoints.best, like).params["student"]
    finally:
        checkpoints.close()
