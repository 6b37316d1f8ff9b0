"""The models of a sequential ensemble, and what a round of it trains on; see setup.py.

config.rounds is the number of rounds, config.steps that of steps a round. config.ensemble:

    space          logits | probabilities: what members are averaged in
    start          student | previous: a round's student begins as config.student says, or as the
                   member before it
    rows           of training text, fixed and the same in every round; 0: all
    fresh          new text in every round instead, with teacher and members in the step
    top_k          logits of a token that are kept where cache.max_gb has no room for all
    weights        equal | learned (on the held-out text): of the members, in the end
    past_run_dirs  finished runs whose members come first
    eval_mean      token | batch: mean over all tokens, or over the means of batches
"""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path

import jax
import numpy as np

from kd_jax.data import cache
from kd_jax.data.loader import Stream
from kd_jax.errors import UserError
from kd_jax.models import blueprint
from kd_jax.objectives import combine
from kd_jax.objectives.sources import SPACES
from kd_jax.recipes.setup import TextSetup
from kd_jax.recipes.stage import Stage
from kd_jax.teachers import signals
from kd_jax.teachers.ensemble import OTHERS, PARTITION, TEACHER, Guides
from kd_jax.train import step
from kd_jax.types import Batch, Model, Params, Signal

_CHOICES = {
    "space": tuple(SPACES),
    "start": ("student", "previous"),
    "weights": ("equal", "learned"),
    "eval_mean": ("token", "batch"),
}


class EnsembleSetup(TextSetup):
    """A teacher and students of one shape."""

    have = {"round": "student"}

    def __init__(self, config, folder=None, devices=None, platform=None):
        super().__init__(config, folder, devices, platform)
        for key, have in _CHOICES.items():
            if config.ensemble[key] not in have:
                raise UserError(
                    f"config.ensemble.{key}={config.ensemble[key]!r}: have {', '.join(have)}"
                )
        if self.head != "clm":
            raise UserError(
                f"config.task.name={config.task.name!r}: an ensemble is one of causal language "
                f"models; take clm or chat"
            )
        objective = self.plan(self.principal)[0].objective
        if objective.needs_teacher_states:
            names = ", ".join(name for name, _ in objective.state_terms)
            raise UserError(
                f"config.objective.{names}: the mean of an ensemble has logits alone; leave it out"
            )

        for term, _ in objective.row_terms:
            if not term.divergence.of_probabilities:
                raise UserError(
                    f"config.objective.{term.name} compares logits themselves, and what is kept "
                    f"of teacher and members is their probabilities; take a divergence such as kl"
                )

    @property
    def vocab_size(self) -> int:
        """Ids that teacher and student share; those beyond are padding."""
        return min(model.config.vocab_size for model in self.models.values())

    @property
    def cache_folder(self) -> Path:
        """Where signals are kept."""
        return cache.folder(self.config.cache.folder) / "signals"

    def beside(self, stage: Stage, frozen: Model, batch: Batch) -> tuple[Guides, Batch]:
        """As in the last round."""
        n, settings, size = self.config.rounds - 1, self.config.ensemble, self.vocab_size
        shape = jax.ShapeDtypeStruct
        params = {"share": shape((), np.float32)} if n else {}
        if settings.fresh:
            params["teacher"] = frozen.params
            if n:
                (member,) = self._stored("student")
                stacked = jax.tree.map(lambda x: shape((n, *x.shape), x.dtype), member)
                params |= {"members": stacked, "weights": shape((n,), np.float32)}
            graphdef = self.models["student"].stacked if n else None
            return Guides(params, size, frozen.graphdef, graphdef, settings.space), batch
        B, T = batch.tokens_BT.shape
        tokens = T * settings.rows or math.inf
        k = signals.kept(tokens, size, settings.top_k, 1e9 * self.config.cache.max_gb)
        signal = Signal(shape((B, T, k), np.float32))
        if k < size:
            ids, rest = shape((B, T, k), np.int32), shape((B, T), np.float32)
            signal = signal.replace(ids_BTK=ids, rest_BT=rest)
        names = (TEACHER, OTHERS) if n else (TEACHER,)
        batch = batch.replace(signals=dict.fromkeys(names, signal))
        return Guides(params, size, space=settings.space), batch

    def answering(self, stage: Stage) -> list[Params]:
        """As in the last round."""
        if not self.config.ensemble.fresh:
            return []
        return self._stored("teacher") + self._stored("student") * (self.config.rounds - 1)

    def _stored(self, model: str) -> list[Params]:
        params = self.models[model].abstract().params
        return [jax.eval_shape(lambda params: blueprint.stored(params, self.policy), params)]

    @property
    def reported(self) -> str:
        """The split that figures are reported on."""
        return "test" if self.config.data.get("test") else "validation"

    def seed_of(self, number: int) -> int:
        """Of the order of the text and of dropout in a round, counted from 1."""
        return int(np.random.SeedSequence([self.config.seed, number]).generate_state(1)[0])

    def stream(self, stage: Stage, number: int) -> Stream:
        """The batches of a round."""
        if self.config.ensemble.fresh:
            whole = self.task.train(stage.batch_size, self.config.seed, **self.processes)
            return whole.later((number - 1) * stage.steps)
        seed = self.seed_of(number)
        return self._train(stage.batch_size).chosen(self.rows_N, seed)

    def one_pass(self, batch_size: int) -> tuple[Stream, int]:
        """The rows that all rounds share, once; and how many rows there are at all."""
        whole = self._train(batch_size)
        return whole.chosen(self.rows_N), whole.size

    def _train(self, batch_size: int) -> Stream:
        return self.task.train(batch_size, self.config.seed, **self.processes)

    @functools.cached_property
    def rows_N(self) -> np.ndarray:
        """The rows that all rounds share: drawn by the run's seed."""
        count = self._train(self.principal.batch_size).size
        wanted = self.config.ensemble.rows or count
        if wanted > count:
            raise UserError(
                f"config.ensemble.rows={wanted}: the training text has {count} rows; lower it, or "
                f"set it to 0 for all of them"
            )
        order_N = np.random.default_rng([self.config.seed, count]).permutation(count)
        return np.sort(order_N[:wanted])

    def judging_plan(self) -> step.Plan:
        """The eval step's of an ensemble and its last member."""
        objective = combine.held_out_of_ensemble(self.policy, self.policy, self.chunk)
        return step.Plan(objective, self.mesh, PARTITION)

    def plan(self, stage: Stage) -> tuple[step.Plan, combine.Knobs]:
        plan, knobs = super().plan(stage)
        return dataclasses.replace(plan, table=PARTITION), knobs

    @property
    def processes(self) -> dict[str, int]:
        """This process, and how many there are."""
        return dict(process_index=jax.process_index(), process_count=jax.process_count())
