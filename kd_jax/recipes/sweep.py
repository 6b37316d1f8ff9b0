"""Trials of one stage of a fine-tuning run over settings, side by side; one table, one heat map.

config.sweep:
    stage     the stage that is tried: student | baseline | ...; stages before it run once
    keys      pairs (dotted key of the config, a list of values, or for a sampler
              {low, high[, log]})
    sampler   grid (every combination) | random | tpe (Optuna's)
    trials    how many, for a sampler

Trials share data, the teachers' logits and, where they differ only in numbers, one compiled step:
temperatures are inputs of the step then, as weights and learning rates always are. A trial is
chosen by the primary metric on held-out training data (one that diverges is the last); the best
one alone is measured on the split that is reported. The folder of a finished trial keeps its
figures and curves; checkpoints stay of the best. The same command goes on with the trials that are
missing.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from kd_jax import storage
from kd_jax.data.settings import settings
from kd_jax.errors import Diverged, UserError
from kd_jax.evals import pictures, table
from kd_jax.evals.quantities import MISSING
from kd_jax.ranges import Real, Whole
from kd_jax.recipes import finetune, keys, stage, workdir
from kd_jax.recipes.answers import Answers
from kd_jax.recipes.finetune_setup import FinetuneSetup as Setup
from kd_jax.recipes.stage import Stage
from kd_jax.recipes.stopwatch import Stopwatch
from kd_jax.recipes.teaching import ask_teachers
from kd_jax.recipes.workdir import RunDirectory
from kd_jax.schedules import learning_rate
from kd_jax.types import Params

log = logging.getLogger(__name__)

DEFAULTS = dict(stage="student", keys=(), sampler="grid", trials=Whole(least=1, default=1))
# Keys that change neither data nor models: trials over them share both.
NUMBERS = ("objective.", "optim.", "stages.", "seed", "steps", "epochs", "batch_size", "patience")

Trial = dict[str, Any]  # dotted key -> value


def run(config: ConfigDict, place: RunDirectory) -> dict[str, Any]:
    """Runs the trials that are missing in `place`; returns results.json."""
    if config.wandb:
        raise UserError("config.wandb: a sweep does not log to W&B; leave it empty")
    watch, folder = Stopwatch(), place.folder
    sweep = settings(config.sweep, DEFAULTS, "sweep")
    try:
        sweep["keys"] = {str(key): values for key, values in sweep["keys"]}
    except (TypeError, ValueError):
        raise UserError("config.sweep.keys: give pairs of a dotted key and its values") from None
    plan = _plan(sweep, config.seed)
    with_keys(config, dict.fromkeys(sweep["keys"]))  # finds unknown ones before the long work
    with watch.part("start-up"):
        setup = Setup(config, folder)
        tried = _stage(setup, sweep["stage"])
        data = setup.task.prepare()
        finetune.check(setup)
        _check_values(setup, sweep["keys"])
        given = finetune.given_teachers(setup)
    place.begin(config, setup, data)
    answers, found = Answers(setup, given), []
    for this in setup.stages[: setup.stages.index(tried)]:
        with watch.part(this.name):
            finetune.run_stage(setup, this, given, answers, folder, setup.split)
    with watch.part("teachers' answers"):
        ask_teachers(setup, tried, answers)
    with watch.part("trials"):
        for number, trial in enumerate(plan(found)):
            found.append(_run_trial(setup, tried.name, trial, given, answers, folder, number))
            _together(f"trial {number}")  # nobody reads its checkpoints any more
            _keep_best(folder, found)
    best = max(found, key=_value)
    if not best["figures"]:
        raise UserError(f"all {len(found)} trials diverged; lower optim.learning_rate")
    with watch.part("best on the reported split"):
        figures_of_best = _report(setup, tried.name, best, answers, given, folder)
    results = place.about(config) | {
        "stages": {tried.name: figures_of_best},
        "split": setup.split,
        "primary": setup.task.primary,
        "data": data,
        "trials": found,
        "best": best,
        **watch.report(),
    }
    if jax.process_index() == 0:
        storage.write_json(folder / "results.json", results)
        _show(sweep, setup.task.primary, results, folder)
    _together("end of the run")
    return results


def _together(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _stage(setup: Setup, name: str) -> Stage:
    for this in setup.stages:
        if this.name == name:
            return this
    raise UserError(
        f"config.sweep.stage={name!r} is no stage of the run; config.stages has "
        f"{', '.join(this.name for this in setup.stages)}"
    )


def _value(trial: dict) -> float:
    """The primary figure; a trial that diverged is worse than any."""
    return trial["figures"].get(trial["primary"], -math.inf)


def _run_trial(
    setup: Setup,
    name: str,
    trial: Trial,
    given: Mapping[str, Params],
    answers: Answers,
    folder: epath.Path,
    number: int,
) -> dict[str, Any]:
    """Trains and judges one trial, or reads what it gave."""
    began, config = time.time(), with_keys(setup.config, trial)
    place = folder / "trials" / f"{number:03d}-{workdir.config_hash(config)}"
    first = jax.process_index() == 0
    if (place / "results.json").exists():
        return storage.read_json(place / "results.json")
    log.info("trial %d: %s", number, ", ".join(f"{k}={v}" for k, v in trial.items()))
    if first:
        place.mkdir(parents=True, exist_ok=True)
        storage.write_json(place / "config.json", workdir.resolved(config))
    own, answers = _of_trial(setup, trial, answers, given, place)
    this = _stage(own, name)
    try:
        found = finetune.run_stage(own, this, dict(given), answers, place, "validation")
    except Diverged as error:
        log.warning("trial %d: %s", number, error)
        found = {}
    result = {
        "trial": number,
        "folder": place.name,
        "keys": trial,
        "primary": own.task.primary,
        "figures": {k: v for k, v in found.items() if isinstance(v, int | float)},
        "seconds": round(time.time() - began, 2),
    }
    if first:
        storage.write_json(place / "results.json", result)
    return result


def _of_trial(setup: Setup, trial: Trial, answers: Answers, given: Mapping, place: epath.Path):
    """The trial's setup and its teachers' answers: the sweep's own where models and data are."""
    config = with_keys(setup.config, trial)
    if all(key.startswith(NUMBERS) for key in trial):
        return setup.with_numbers(config, place), answers
    own = Setup(config, place)
    finetune.check(own)
    return own, Answers(own, dict(given))


def _report(setup: Setup, name: str, best: dict, answers: Answers, given: Mapping, folder) -> dict:
    """The best trial's figures on the split that is reported."""
    place = folder / "trials" / best["folder"]

    def figures() -> dict[str, Any]:
        own, theirs = _of_trial(setup, best["keys"], answers, given, place)
        params = stage.restore_best(own, _stage(own, name))
        return finetune.held_out_figures(own, _stage(own, name), params, theirs, own.split)

    return stage.kept(place / "reported.json", figures)


def with_keys(config: ConfigDict, trial: Trial) -> ConfigDict:
    """The config with dotted keys set. A temperature becomes an input of the step: a constant would
    be compiled into it. Raises UserError for a key that the config lacks."""
    changed = ConfigDict(config.to_dict(), type_safe=False)
    for key, value in trial.items():
        *path, last = key.split(".")
        section = changed
        for part in path:
            section = section.get(part) if isinstance(section, ConfigDict) else None
        if not isinstance(section, ConfigDict) or last not in section:
            have = ", ".join(section) if isinstance(section, ConfigDict) else "nothing"
            raise UserError(f"config.sweep.keys: {key} is not in the config; there: {have}")
        if last == "temperature":
            value = dict(kind="linear", start=value, end=value)
        section[last] = value
    return changed


def _plan(sweep: dict[str, Any], seed: int):
    """From the trials that are done, lazily, the keys of each trial in turn."""
    keys = sweep["keys"]
    if not keys:
        raise UserError("config.sweep.keys is empty: give dotted keys with their values")
    if sweep["sampler"] == "grid":
        for key, values in keys.items():
            if not isinstance(values, list | tuple) or not values:
                raise UserError(f"config.sweep.keys: {key}={values!r} should be a list of values")
        every = [dict(zip(keys, each, strict=True)) for each in itertools.product(*keys.values())]
        return lambda found: iter(every)
    if sweep["sampler"] not in ("random", "tpe"):
        raise UserError(f"config.sweep.sampler={sweep['sampler']!r}: have grid, random, tpe")
    space = {key: _distribution(key, values) for key, values in keys.items()}
    return lambda found: _sampled(sweep, space, seed, found)


def _check_values(setup: Setup, tried: Mapping[str, Any]) -> None:
    """Raises UserError at a value that a trial would be refused for; of a range, at its ends."""
    ends = [v if isinstance(v, list | tuple) else (v["low"], v["high"]) for v in tried.values()]
    for values in itertools.product(*ends):
        trial = dict(zip(tried, values, strict=True))
        config = with_keys(setup.config, trial)
        keys.check(config)
        if all(key.startswith(NUMBERS) for key in trial):
            own = setup.with_numbers(config, setup.folder)
            for this in own.stages:
                own.plan(this)
                learning_rate(this.optim, this.steps)


def _sampled(sweep: dict, space: dict, seed: int, found: list[dict]) -> Iterator[Trial]:
    """Optuna proposes, and learns from every trial before the next. All proposals are made again
    when a sweep is resumed, which gives the same ones."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    samplers = {"random": optuna.samplers.RandomSampler, "tpe": optuna.samplers.TPESampler}
    study = optuna.create_study(direction="maximize", sampler=samplers[sweep["sampler"]](seed=seed))
    for _ in range(sweep["trials"]):
        proposed = study.ask(space)
        yield dict(proposed.params)
        study.tell(proposed, _value(found[-1]))


def _distribution(key: str, values: Any) -> Any:
    from optuna import distributions

    if isinstance(values, list | tuple) and values:
        return distributions.CategoricalDistribution(list(values))
    try:
        bounds = settings(values, dict(low=Real(), high=Real(), log=False), f"sweep.keys[{key}]")
        low, high, scale = bounds["low"], bounds["high"], bounds["log"]
        if isinstance(low, int) and isinstance(high, int):
            return distributions.IntDistribution(low, high, log=scale)
        return distributions.FloatDistribution(low, high, log=scale)
    except KeyError:
        raise UserError(f"config.sweep.keys: {key}={values!r}: give low and high") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"config.sweep.keys: {key}={values!r}: {error}") from None


def _keep_best(folder: epath.Path, found: list[dict]) -> None:
    if jax.process_index() > 0:
        return
    best = max(found, key=_value)
    for trial in found:
        if trial is not best:
            for path in (folder / "trials" / trial["folder"]).glob("*/checkpoints"):
                path.rmtree(missing_ok=True)


def _show(sweep: dict, primary: str, results: dict, folder: epath.Path) -> None:
    """Prints the table, writes it as trials.md, and draws a heat map of two keys' grid."""
    trials, keys = results["trials"], list(sweep["keys"])
    shown = trials_table(trials, keys, primary)
    shown.print()
    (folder / "trials.md").write_text(shown.markdown())
    print(
        f"best: trial {results['best']['trial']}, {folder / 'trials' / results['best']['folder']}"
    )
    if len(keys) == 2 and sweep["sampler"] == "grid":
        rows, columns = (list(sweep["keys"][key]) for key in keys)
        at = {tuple(t["keys"].values()): t["figures"].get(primary, math.nan) for t in trials}
        values = [[at[row, column] for column in columns] for row in rows]
        path = pictures.heat_map(
            *(list(map(str, rows)), list(map(str, columns)), values, folder / "heat_map.png"),
            title=f"{results['config']}: {primary} on held-out training data",
            labels=(keys[0], keys[1], primary),
        )
        print(f"heat map: {path}", flush=True)


def trials_table(trials: list[dict], keys: list[str], primary: str) -> table.Table:
    """A row a trial, the best first."""
    ranked = sorted(trials, key=_value, reverse=True)
    names = [primary, "loss", "best_step"]
    rows = []
    for trial in ranked:
        values = [trial["keys"][key] for key in keys]
        values += [trial["figures"].get(name, MISSING) for name in names]
        rows.append([str(trial["trial"]), *map(_short, values), _short(trial["seconds"])])
    header = ["trial", *keys, *names, "seconds"]
    return table.Table("trials, on held-out training data", header, rows)


def _short(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)
