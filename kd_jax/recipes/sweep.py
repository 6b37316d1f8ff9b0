"""Searches settings of one stage of a run, and shows the trials in one table and one heat map.

Trials share data, the teachers' logits and, if they differ only in numbers, one compiled step:
temperatures are then inputs of the step, as weights and learning rates always are. The best trial
is chosen by the primary metric on held-out training data (diverged trials rank last); only the best
is evaluated on the reported split. The folder of a finished trial keeps its metrics and curves;
only the best trial keeps its checkpoints. The same command continues with the missing trials.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from kd_jax import config as defaults
from kd_jax import storage
from kd_jax.errors import Diverged, UserError
from kd_jax.ranges import Real, settings
from kd_jax.recipes import distil
from kd_jax.report import quantities, table
from kd_jax.report.quantities import MISSING
from kd_jax.run import measure, stage, workdir
from kd_jax.run.results import Stopwatch, kept, together
from kd_jax.run.run import Run, build
from kd_jax.run.teaching import TeacherLogits, given_teachers, stored_logits
from kd_jax.run.workdir import RunDirectory
from kd_jax.types import Model, Params

log = logging.getLogger(__name__)

# Keys that change neither data nor models: trials over them share both.
NUMBERS = ("objective.", "optim.", "stages.", "seed", "steps", "epochs", "batch_size", "patience")

Trial = dict[str, Any]  # dotted key -> value
Rank = Callable[[dict], float]  # of a trial: larger is better


def run(config: ConfigDict, place: RunDirectory) -> dict[str, Any]:
    """Runs the trials that are missing in `place`; returns the contents of results.json."""
    if config.wandb:
        raise UserError("config.wandb: a sweep does not log to W&B; leave it empty")
    watch, folder = Stopwatch(), place.folder
    sweep = settings(config.sweep, defaults.ranges(defaults.SECTIONS["sweep"]), "sweep")
    try:
        sweep["keys"] = {str(key): values for key, values in sweep["keys"]}
    except (TypeError, ValueError):
        raise UserError("config.sweep.keys: give pairs of a dotted key and its values") from None
    plan = _plan(sweep, config.seed)
    with_keys(config, dict.fromkeys(sweep["keys"]))  # finds unknown ones before the long work
    with watch.section("start-up"):
        built = build(config, folder)
        tried = sweep["stage"]
        if built.stage(tried) is None:
            raise UserError(
                f"config.sweep.stage={tried!r} is no stage of the run; config.stages has "
                f"{', '.join(this.name for this in built.stages)}"
            )
        distil.check(built)
        data = built.task.prepare()
        _check_values(built, sweep["keys"])
        given = given_teachers(built)

    def rank(trial: dict) -> float:
        """Gives the primary figure, negated where a smaller one is better, and puts a trial that
        diverged last."""
        found = trial["figures"].get(trial["primary"])
        return -math.inf if found is None else found if built.task.larger else -found

    place.begin(built, data)
    teachers, found = TeacherLogits(built, given), []
    for name in [each.name for each in built.stages]:
        this = built.ready(name, given)
        if name == tried:
            break
        with watch.section(name):
            distil.run_stage(built, this, given, teachers, built.split)
    with watch.section("teachers' logits"):
        stored_logits(built, this, teachers)
    with watch.section("trials"):
        for number, trial in enumerate(plan(found, rank)):
            found.append(_run_trial(built, tried, trial, given, teachers, number))
            together(f"trial {number}")  # nobody reads its checkpoints any more
            _keep_best(folder, found, rank)
    best = max(found, key=rank)
    if not best["figures"]:
        raise UserError(f"all {len(found)} trials diverged; lower optim.learning_rate")
    with watch.section("best on the reported split"):
        figures_of_best = _report(built, tried, best, teachers, given)
    results = place.about(built, data) | {
        "stages": {tried: figures_of_best},
        "primary": built.task.primary,
        "trials": found,
        "best": best,
        **watch.report(),
    }
    if jax.process_index() == 0:
        storage.write_json(folder / "results.json", results)
        _show(sweep, rank, results, folder)
    together("end of the run")
    return results


def _run_trial(
    run: Run,
    name: str,
    trial: Trial,
    given: Mapping[str, Params],
    teachers: TeacherLogits,
    number: int,
) -> dict[str, Any]:
    """Trains and evaluates one trial, or reads its results if it is finished."""
    began, config = time.time(), with_keys(run.config, trial)
    place = run.folder / "trials" / f"{number:03d}-{workdir.config_hash(config)}"
    first = jax.process_index() == 0
    if (place / "results.json").exists():
        return storage.read_json(place / "results.json")
    log.info("trial %d: %s", number, ", ".join(f"{k}={v}" for k, v in trial.items()))
    if first:
        place.mkdir(parents=True, exist_ok=True)
        storage.write_json(place / "config.json", workdir.resolved(config))
    own, teachers = _of_trial(run, trial, teachers, given, place)
    this = own.ready(name, dict(given))
    try:
        found = distil.run_stage(own, this, dict(given), teachers, "validation")[name]
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


def _of_trial(run: Run, trial: Trial, teachers: TeacherLogits, given: Mapping, place: epath.Path):
    """Makes the run of a trial and its teachers' logits; the sweep's are reused if the trial
    changes only numbers."""
    config = with_keys(run.config, trial)
    if all(key.startswith(NUMBERS) for key in trial):
        return run.changed(config, place), teachers
    own = build(config, place)
    distil.check(own)
    return own, TeacherLogits(own, dict(given))


def _report(run: Run, name: str, best: dict, teachers: TeacherLogits, given: Mapping) -> dict:
    """Computes the best trial's metrics on the reported split."""
    place = run.folder / "trials" / best["folder"]

    def figures() -> dict[str, Any]:
        own, theirs = _of_trial(run, best["keys"], teachers, given, place)
        this = own.stage(name)
        params = stage.restore_best(own, this)
        model = Model(params, own.models[this.model].abstract().graphdef)
        return measure.figures(own, this, model, theirs, own.split)

    return kept(place / "reported.json", figures)


def with_keys(config: ConfigDict, trial: Trial) -> ConfigDict:
    """Sets dotted keys in a copy of the config. A temperature becomes a schedule, an input of the
    step, since a constant would be compiled into it. UserError for a key that the config lacks."""
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
    """Makes a function that proposes trials, given the finished ones and how they rank."""
    keys = sweep["keys"]
    if not keys:
        raise UserError("config.sweep.keys is empty: give dotted keys with their values")
    if sweep["sampler"] == "grid":
        for key, values in keys.items():
            if not isinstance(values, list | tuple) or not values:
                raise UserError(f"config.sweep.keys: {key}={values!r} should be a list of values")
        every = [dict(zip(keys, each, strict=True)) for each in itertools.product(*keys.values())]
        return lambda found, rank: iter(every)
    space = {key: _distribution(key, values) for key, values in keys.items()}
    return lambda found, rank: _sampled(sweep, space, seed, found, rank)


def _check_values(run: Run, tried: Mapping[str, Any]) -> None:
    """Raises UserError for a value that is invalid in a trial; for a range, checks both ends."""
    ends = [v if isinstance(v, list | tuple) else (v["low"], v["high"]) for v in tried.values()]
    for values in itertools.product(*ends):
        trial = dict(zip(tried, values, strict=True))
        config = with_keys(run.config, trial)
        defaults.check(config)
        if all(key.startswith(NUMBERS) for key in trial):
            run.changed(config, run.folder)


def _sampled(sweep: dict, space: dict, seed: int, found: list[dict], rank: Rank) -> Iterator[Trial]:
    """Proposes trials with Optuna, which learns from each before the next. A resumed sweep makes
    all proposals again, with the same results."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    samplers = {"random": optuna.samplers.RandomSampler, "tpe": optuna.samplers.TPESampler}
    study = optuna.create_study(direction="maximize", sampler=samplers[sweep["sampler"]](seed=seed))
    for _ in range(sweep["trials"]):
        proposed = study.ask(space)
        yield dict(proposed.params)
        study.tell(proposed, rank(found[-1]))


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


def _keep_best(folder: epath.Path, found: list[dict], rank: Rank) -> None:
    if jax.process_index() > 0:
        return
    best = max(found, key=rank)
    for trial in found:
        if trial is not best:
            for path in (folder / "trials" / trial["folder"]).glob("*/checkpoints"):
                path.rmtree(missing_ok=True)


def _show(sweep: dict, rank: Rank, results: dict, folder: epath.Path) -> None:
    """Prints the table of trials, writes it as trials.md, and draws a heat map for a grid of two
    keys."""
    trials, keys, primary = results["trials"], list(sweep["keys"]), results["primary"]
    shown = trials_table(trials, keys, primary, rank)
    shown.print()
    (folder / "trials.md").write_text(shown.markdown())
    print(
        f"best: trial {results['best']['trial']}, {folder / 'trials' / results['best']['folder']}"
    )
    if len(keys) == 2 and sweep["sampler"] == "grid":
        from kd_jax.report import pictures  # with matplotlib, slow to import

        rows, columns = (list(sweep["keys"][key]) for key in keys)
        at = {tuple(t["keys"].values()): t["figures"].get(primary, math.nan) for t in trials}
        values = [[at[row, column] for column in columns] for row in rows]
        path = pictures.heat_map(
            *(list(map(str, rows)), list(map(str, columns)), values, folder / "heat_map.png"),
            title=f"{results['config']}: {primary} on held-out training data",
            labels=(keys[0], keys[1], primary),
            better=quantities.of_keys([primary])[0].better,
        )
        print(f"heat map: {path}", flush=True)


def trials_table(trials: list[dict], keys: list[str], primary: str, rank: Rank) -> table.Table:
    """Makes a table with a row for each trial, the best first."""
    ranked = sorted(trials, key=rank, reverse=True)
    names = [*dict.fromkeys((primary, "loss", "best_step"))]
    rows = []
    for trial in ranked:
        values = [trial["keys"][key] for key in keys]
        values += [trial["figures"].get(name, MISSING) for name in names]
        rows.append([str(trial["trial"]), *map(_short, values), _short(trial["seconds"])])
    header = ["trial", *keys, *names, "seconds"]
    return table.Table("trials, on held-out training data", header, rows)


def _short(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)
