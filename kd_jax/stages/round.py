"""Makes the stage of one round of a sequential ensemble, which kd_jax/recipes/ensemble.py repeats.

config.ensemble describes the members and their mean.
"""

from __future__ import annotations

import functools
import math

import jax
import numpy as np

from kd_jax.data.loader import Stream
from kd_jax.errors import UserError
from kd_jax.metrics import flops
from kd_jax.models import blueprint
from kd_jax.run import cost, stage, text_logits
from kd_jax.run.run import Run
from kd_jax.run.stage import Settings, Stage, StepInputs
from kd_jax.run.text_logits import TextLogits
from kd_jax.teachers.ensemble import OTHERS, PARTITION, TEACHER, EnsembleTeacher
from kd_jax.types import Params

SECTION = "ensemble"


def make(run: Run, name: str, settings: Settings) -> Stage:
    """Makes the stage that every round of an ensemble runs again."""
    config = run.config
    if run.head != "clm":
        raise UserError(
            f"config.task.name={config.task.name!r}: an ensemble is one of causal language "
            f"models; take clm or chat"
        )
    made = stage.make(
        run,
        settings,
        recipe="ensemble",
        table=PARTITION,
        step_inputs=_step_inputs,
    )
    if text_logits.cache_settings(run)["logits"]:
        raise UserError(
            "config.cache.logits is for a single teacher; for an ensemble set config.ensemble.top_k"
        )
    text_logits.check_terms(made.program.objective, "the mean of an ensemble")
    return made


def vocab_size(run: Run) -> int:
    """Counts the ids that teacher and student share; higher ids are padding."""
    return min(model.config.vocab_size for model in run.models.values())


def kept(run: Run, tokens: float) -> int:
    """Chooses how many logits of a token are stored: all if those of the teacher, a mean and the
    next mean fit on disk, else config.ensemble.top_k."""
    size, settings = vocab_size(run), run.config.ensemble
    whole = 3 * text_logits.size_of(tokens, size, size)
    fits = whole <= 1e9 * text_logits.cache_settings(run)["max_gb"]
    return size if fits else min(size, settings.top_k)


def seed_of(run: Run, number: int) -> int:
    """Computes the seed of a round (counted from 1) for the order of the text and dropout."""
    return int(np.random.SeedSequence([run.config.seed, number]).generate_state(1)[0])


def batches(run: Run, this: Stage, number: int) -> Stream:
    """Makes the stream of training batches of a round."""
    whole = _train(run, this.batch_size)
    if run.config.ensemble.fresh:
        return whole.later((number - 1) * this.steps)
    return whole.chosen(rows_N(run), seed_of(run, number))


def text(run: Run, this: Stage) -> TextLogits:
    """Opens the stored logits of the rows that all rounds share."""
    rows, space = _train(run, this.batch_size).chosen(rows_N(run)), run.config.ensemble.space
    everywhere = bool(this.program.objective.everywhere)
    k = functools.partial(kept, run)
    return TextLogits(run, rows, rows.steps, vocab_size(run), k, space=space, everywhere=everywhere)


def rows_N(run: Run) -> np.ndarray:
    """Draws the training rows that all rounds share, by the run's seed."""
    count = _train(run, run.principal.batch_size).size
    wanted = run.config.ensemble.rows or count
    if wanted > count:
        raise UserError(
            f"config.ensemble.rows={wanted}: the training text has {count} rows; lower it, or "
            f"set it to 0 for all of them"
        )
    order_N = np.random.default_rng([run.config.seed, count]).permutation(count)
    return np.sort(order_N[:wanted])


def _train(run: Run, batch_size: int) -> Stream:
    return run.task.train(batch_size, run.config.seed, **run.processes)


def training_flops(run: Run, this: Stage, past: int) -> int:
    """Counts the training FLOPs of all rounds of an ensemble that starts with `past` members.

    With fixed text these are the steps, and one pass over the rows by the teacher and by each
    member but the last; otherwise teacher and members run in every step.
    """
    shape = cost.shape_of_step(run, this)
    rounds, (_, tokens, positions) = run.config.rounds, shape
    student, teacher = (run.models[name].abstract().params for name in ("student", "teacher"))
    if run.config.ensemble.fresh:
        frozen = ([teacher, *[student] * (past + number)] for number in range(rounds))
        return this.steps * sum(flops.train_step(student, each, {}, *shape) for each in frozen)
    total = rounds * this.steps * flops.train_step(student, [], {}, *shape)
    for model, passes in ((teacher, 1), (student, past + rounds - 1)):
        total += passes * flops.forward(model, len(rows_N(run)), tokens, positions)
    return total


def _step_inputs(run: Run, this: Stage) -> StepInputs:
    """Describes a step of the last round."""
    n, settings, size = run.config.rounds - 1, run.config.ensemble, vocab_size(run)
    batch, shape = run.task.shapes(this.batch_size), jax.ShapeDtypeStruct
    params = {"share": shape((), np.float32)} if n else {}
    if settings.fresh:
        teacher, member = _stored(run, "teacher"), _stored(run, "student")
        params["teacher"] = teacher
        if n:
            stacked = jax.tree.map(lambda x: shape((n, *x.shape), x.dtype), member)
            params |= {"members": stacked, "weights": shape((n,), np.float32)}
        graphdef = run.models["student"].stacked if n else None
        own = run.models["teacher"].abstract().graphdef
        whole = EnsembleTeacher(params, size, own, graphdef, settings.space)
        return StepInputs(whole, batch, [teacher, *[member] * n])
    k = kept(run, batch.tokens_BT.shape[1] * settings.rows or math.inf)
    logits, names = text_logits.abstract(batch.tokens_BT.shape, k, size), (TEACHER, OTHERS)
    batch = batch.replace(stored=dict.fromkeys(names if n else names[:1], logits))
    return StepInputs(EnsembleTeacher(params, size, space=settings.space), batch, [])


def _stored(run: Run, model: str) -> Params:
    params = run.models[model].abstract().params
    return jax.eval_shape(lambda params: blueprint.stored(params, run.policy), params)
