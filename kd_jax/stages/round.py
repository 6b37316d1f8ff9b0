"""One round of a sequential ensemble, the stage that kd_jax/recipes/ensemble.py repeats.

config.ensemble says what its members and their mean are.
"""

from __future__ import annotations

import math
from pathlib import Path

import jax
import numpy as np

from kd_jax.data import cache
from kd_jax.data.loader import Stream
from kd_jax.errors import UserError
from kd_jax.metrics import flops
from kd_jax.models import blueprint
from kd_jax.run import cost, stage
from kd_jax.run.run import Run
from kd_jax.run.stage import Settings, Stage, StepInputs
from kd_jax.teachers import signals
from kd_jax.teachers.ensemble import OTHERS, PARTITION, TEACHER, Guides
from kd_jax.types import Params, Signal

SECTION = "ensemble"


def make(run: Run, name: str, settings: Settings) -> Stage:
    """The stage that every round of an ensemble goes through anew."""
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
    objective = made.program.objective
    if objective.needs_teacher_states:
        names = ", ".join(name for name, _ in objective.state_terms)
        raise UserError(
            f"config.objective.{names}: the mean of an ensemble has logits alone; leave it out"
        )
    for term in objective.row_terms:
        if not term.divergence.of_probabilities:
            raise UserError(
                f"config.objective.{term.name} compares logits themselves, and what is kept "
                f"of teacher and members is their probabilities; take a divergence such as kl"
            )
    return made


def vocab_size(run: Run) -> int:
    """Ids that teacher and student share; those beyond are padding."""
    return min(model.config.vocab_size for model in run.models.values())


def cache_folder(run: Run) -> Path:
    """Where logits of the training text are kept."""
    return cache.folder(run.config.cache.folder) / "signals"


def seed_of(run: Run, number: int) -> int:
    """Of the order of the text and of dropout in a round, counted from 1."""
    return int(np.random.SeedSequence([run.config.seed, number]).generate_state(1)[0])


def batches(run: Run, this: Stage, number: int) -> Stream:
    """The batches of a round."""
    whole = _train(run, this.batch_size)
    if run.config.ensemble.fresh:
        return whole.later((number - 1) * this.steps)
    return whole.chosen(rows_N(run), seed_of(run, number))


def one_pass(run: Run, batch_size: int) -> tuple[Stream, int]:
    """The rows that all rounds share, once; and how many rows there are at all."""
    whole = _train(run, batch_size)
    return whole.chosen(rows_N(run)), whole.size


def rows_N(run: Run) -> np.ndarray:
    """The rows that all rounds share: drawn by the run's seed."""
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
    """FLOPs of all rounds of an ensemble that has `past` members before them. Where the text is
    fixed: its steps, and one pass over the rows by the teacher and by each member but the last;
    otherwise teacher and members answer in every step."""
    shape = cost.shape_of_step(run, this)
    rounds, (_, tokens, positions) = run.config.rounds, shape
    student, teacher = (run.models[name].abstract().params for name in ("student", "teacher"))
    if run.config.ensemble.fresh:
        beside = ([teacher, *[student] * (past + number)] for number in range(rounds))
        return this.steps * sum(flops.train_step(student, each, {}, *shape) for each in beside)
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
        guides = Guides(params, size, own, graphdef, settings.space)
        return StepInputs(guides, batch, [teacher, *[member] * n])
    B, T = batch.tokens_BT.shape
    tokens = T * settings.rows or math.inf
    k = signals.kept(tokens, size, settings.top_k, 1e9 * run.config.cache.max_gb)
    signal = Signal(shape((B, T, k), np.float32))
    if k < size:
        ids, rest = shape((B, T, k), np.int32), shape((B, T), np.float32)
        signal = signal.replace(ids_BTK=ids, rest_BT=rest)
    names = (TEACHER, OTHERS) if n else (TEACHER,)
    batch = batch.replace(signals=dict.fromkeys(names, signal))
    return StepInputs(Guides(params, size, space=settings.space), batch, [])


def _stored(run: Run, model: str) -> Params:
    params = run.models[model].abstract().params
    return jax.eval_shape(lambda params: blueprint.stored(params, run.policy), params)
