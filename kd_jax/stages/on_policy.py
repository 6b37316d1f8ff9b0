"""Distils on the student's own text: it writes, the teacher judges every token that it wrote.

Agarwal et al. 2023, "On-Policy Distillation of Language Models: Learning from Self-Generated
Mistakes" (GKD), arXiv:2306.13649, algorithm 1. In a share `config.rollout.lambda` of the steps the
completions of the prompts are the student's, sampled from it as it is at that step; in the others
the step is one of the kind `plain`, on the data's own text. Any divergence may be the objective.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax

from kd_jax.errors import UserError
from kd_jax.metrics import flops
from kd_jax.models.generate import Sampling
from kd_jax.objectives import measures
from kd_jax.objectives.vocab import RowTerm
from kd_jax.ranges import Real
from kd_jax.run import endings, own_text, stage, text_logits
from kd_jax.run.prompts import Prompts
from kd_jax.run.rollout import Rollout
from kd_jax.run.run import Run
from kd_jax.run.sampler import lower
from kd_jax.run.settings import Settings
from kd_jax.run.stage import Stage, StepInputs, Writing
from kd_jax.schedules import Schedule, value_schedule
from kd_jax.tasks.task import batch_shapes

SECTION = "rollout"


def make(run: Run, name: str, settings: Settings) -> Stage:
    """Makes the stage in which the student learns from what it writes itself."""
    key = "config.rollout.lambda"
    share = value_schedule(run.config.rollout["lambda"], settings.steps, key, Real(least=0, most=1))
    shares = [share(step) for step in range(0, settings.steps, run.config.rollout.every)]
    plain = stage.make(run, settings)
    _check(run, plain, min(shares), max(shares))
    measured = (*plain.program.objective.measured, measures.REVERSE_KL_T1, measures.ENTROPY)
    length = run.config.rollout.prompt_tokens + run.config.rollout.max_new_tokens
    once = flops.forward(
        run.models[plain.model].counted(),
        plain.batch_size,
        length,
        run.config.rollout.max_new_tokens,
    )
    objective = dataclasses.replace(plain.program.objective, measured=measured)
    return dataclasses.replace(
        plain,
        program=dataclasses.replace(plain.program, objective=objective),
        writing=Writing(functools.partial(_writer, share), _lowered, once),
        prompt_tokens=run.config.rollout.prompt_tokens,
        own_text=own_text.OwnText,
        step_inputs=functools.partial(_step_inputs, max(shares)),
        more_training=_more_training(run, plain, shares, once),
    )


def _check(run: Run, this: Stage, least: float, most: float) -> None:
    """Raises UserError for what cannot be learned from, or on, the student's own text; `least` and
    `most` are the bounds of lambda."""
    rollout, objective = run.config.rollout, this.program.objective
    if run.head != "clm":
        raise UserError(
            f"stage {this.name} writes text, and config.task.name={run.config.task.name!r} is no "
            f"causal language modelling: take clm or chat"
        )
    if not this.learns:
        raise UserError(f"stage {this.name} is judged by a teacher: give it an objective")
    if most > 0 and text_logits.are_kept(run, this):
        raise UserError(
            "config.cache.logits: nobody has logits of what the student will write; leave it "
            "empty, so that the teacher runs in the step"
        )
    models = (run.models[each].config for each in (this.model, this.teachers[0]))
    room = min(each.most_written(rollout.prompt_tokens) for each in models)
    longest = rollout.prompt_tokens + rollout.max_new_tokens
    if longest > room:
        raise UserError(
            f"config.rollout: prompts of {rollout.prompt_tokens} tokens and "
            f"{rollout.max_new_tokens} new ones are {longest}, and the models have positions for "
            f"{room}; lower one of them"
        )
    if run.config.checkpoint.every % rollout.every:
        raise UserError(
            f"config.checkpoint.every={run.config.checkpoint.every} is no multiple of "
            f"config.rollout.every={rollout.every}: a run is saved only between completions"
        )
    if run.tokenizers:
        own_text.sampling(run, this)
    for term in objective.row_terms:
        _check_term(run, term, least)


def _check_term(run: Run, term: RowTerm, least: float) -> None:
    rollout, where = run.config.rollout, f"config.objective.{term.name}"
    if term.divergence.of_written:
        if least < 1:
            raise UserError(f"{where} judges the student's own words alone: set rollout.lambda=1")
        if (rollout.temperature, rollout.top_p, rollout.top_k) != (1.0, 1.0, 0):
            raise UserError(
                f"{where} is unbiased only for words drawn from the student's distribution itself: "
                f"set rollout.temperature=1, top_p=1, top_k=0"
            )
    elif not term.divergence.needs_teacher and least == 1:
        raise UserError(
            f"{where} learns labels, and with rollout.lambda=1 all of them are the student's own "
            f"words: leave it out, or lower rollout.lambda"
        )


def _writer(share: Schedule, run: Run, this: Stage) -> Rollout:
    endings.warn_of_new_template(run, this.model, this.after)
    terms = this.program.objective.row_terms
    return Rollout(
        run,
        this.program.table,
        Prompts(run, this, run.config.rollout.prompt_tokens),
        own_text.sampling(run, this),
        share,
        [term.name for term in terms if not term.divergence.needs_teacher],
        any(term.divergence.of_written for term in terms),
    )


def _step_inputs(most: float, run: Run, this: Stage) -> StepInputs:
    """Describes a step on completions that the student wrote, if there are any."""
    inputs = stage.with_teacher(run, this)
    if not most:
        return inputs
    own = run.config.rollout
    judged = any(term.divergence.of_written for term in this.program.objective.row_terms)
    length = own.prompt_tokens + own.max_new_tokens - 1
    batch = batch_shapes(this.batch_size, length, length)
    written = jax.ShapeDtypeStruct(batch.weights.shape, batch.weights.dtype) if judged else None
    return inputs._replace(batch=batch.replace(written=written))


def _lowered(run: Run, this: Stage) -> jax.stages.Lowered:
    """Lowers the program that writes a batch, from shapes alone."""
    own = run.config.rollout
    sampling = Sampling(own.max_new_tokens, own.temperature, own.top_k, own.top_p, (0,))
    model = stage.abstract_state(run, this).student
    shape = this.batch_size, own.prompt_tokens
    return lower(run.mesh, this.program.table, model, shape, sampling)


def _more_training(run: Run, this: Stage, shares: Sequence[float], once: int) -> dict[str, int]:
    """Counts the FLOPs of a training besides its steps on completions that the student wrote:
    those of writing, `once` for a batch, and what steps on the data's text take more. `shares`:
    how probable it is that the student writes, each time that it may."""
    model, times = run.models[this.model].counted(), sum(shares)
    given, batch = this.step_inputs(run, this), _step_inputs(max(shares), run, this).batch
    plain, written = (
        flops.train_step(model, given.computing, {}, *each.tokens_BT.shape, each.labels.shape[1])
        for each in (given.batch, batch)
    )
    others = this.steps * (1 - times / len(shares))
    return {"training_flops": round(times * once + others * (plain - written))}
