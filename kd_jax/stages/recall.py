"""What a teacher, and the members that there are, say of the training text: computed once for a
fixed set of rows, kept on disk (teachers/signals.py), and found again by content.

The name of a teacher's signal says which rows, weights, and how many logits; that of a mean of n
members which n, in their order. To add a member is one pass over the rows, which reads the mean of
those before it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from kd_jax.data import cache
from kd_jax.data.loader import Stream
from kd_jax.models import family
from kd_jax.models.blueprint import Blueprint
from kd_jax.run.run import Run
from kd_jax.stages.round import cache_folder, vocab_size
from kd_jax.teachers import signals, store
from kd_jax.teachers.ensemble import OTHERS
from kd_jax.teachers.signals import Signals
from kd_jax.train import sharding
from kd_jax.train.passes import one_behind, signal_step
from kd_jax.train.progress import ProgressBar
from kd_jax.train.sharding import place
from kd_jax.types import Batch, Model, Params, Signal

log = logging.getLogger(__name__)

SAMPLE = 1000  # tokens on which kept logits are compared with all of them


class Recall:
    """Signals over the rows of one pass."""

    def __init__(self, run: Run, teacher: Model, rows: Stream, count: int):
        """`teacher`: as `answers.frozen` lays it out; `rows`: one pass over them; `count`: of all
        rows that there are, ids below it."""
        self._run, self._teacher, self._rows = run, teacher, rows
        self._members: list[str] = []  # identities of those that were asked for
        self._counts_R, self._digest = _look_through(rows, count)
        settings = run.config.ensemble
        self._space, self.vocab_size = settings.space, vocab_size(run)
        self._root = cache_folder(run)
        if jax.process_count() > 1:  # all compute together, and each keeps what it computed
            self._root /= f"process_{jax.process_index()}_of_{jax.process_count()}"
        tokens = int(self._counts_R.sum())
        self._max_bytes = 1e9 * run.config.cache.max_gb
        self.k = signals.kept(tokens, self.vocab_size, settings.top_k, self._max_bytes)
        gigabytes = signals.size_of(tokens, self.k, self.vocab_size) / 1e9
        log.info(
            "%s learnt tokens; %s logits of each are kept, %.3g GB a signal",
            *(f"{tokens:,}", "all" if self.k == self.vocab_size else f"{self.k}", gigabytes),
        )

    @functools.cached_property
    def teacher(self) -> Signals:
        """The teacher's signal."""
        identity = _identity(self._teacher, self._run.models["teacher"])
        return self._after([self._teacher], [identity], "teacher", needed=set())

    def mean(self, members: Sequence[Params]) -> Signals:
        """That of the mean of all members; those of an earlier call come first in every later
        one."""
        described = self._run.models["student"]
        models = [Model(params, described.abstract().graphdef) for params in members]
        new = models[len(self._members) :]
        self._members += [_identity(model, described) for model in new]
        of_teacher = self.teacher.folder.name
        return self._after(models, self._members[: len(models)], "member", needed={of_teacher})

    def _after(
        self, models: Sequence[Model], identities: Sequence[str], what: str, needed: set[str]
    ) -> Signals:
        """The signal of the mean of all models, from the longest part of them that is there;
        signals that are `needed` stay."""
        about = what, self._space, self._digest, self.k, self.vocab_size, self._run.policy
        names = [cache.key(*about, *identities[: n + 1]) for n in range(len(models))]
        described = self._counts_R, self.vocab_size
        there, found = len(models), None
        while there and found is None:
            found = signals.opened(self._root / names[there - 1], *described)
            if not _everywhere(found is not None):
                there, found = there - 1, None
        for n in range(there, len(models)):
            if jax.process_count() > 1:  # some may have it, and all compute together
                cache.remove(self._root / names[n], signals.SETTING)
            size = signals.size_of(int(self._counts_R.sum()), self.k, self.vocab_size)
            kept = {*needed, *names[max(0, n - 1) : n]}
            signals.make_room(self._root, size, self._max_bytes, kept)
            who = f"{what} {n + 1}"
            compute = functools.partial(self._pass, models[n], n, found, who)
            found = signals.written(self._root / names[n], *described, compute, who)
        if self.k < self.vocab_size:
            log.info(
                "%s: %d of %d logits are kept: KL(all || kept) %.3g nats a token on %d tokens",
                *(what, self.k, self.vocab_size, *self._error(models, found)),
            )
        return found

    def _pass(
        self, model: Model, n: int, before: Signals | None, what: str
    ) -> Iterator[tuple[Batch, Signal]]:
        """Adds a model to the mean of the n before it."""
        bar = ProgressBar(f"logits of {what}", 0, self._rows.steps)

        def answered() -> Iterator[tuple[Batch, Signal]]:
            for batch in self._rows.batches():
                given = None if before is None else {OTHERS: before.of(batch)}
                yield batch, self._step(model, batch.replace(signals=given), n, self.k)

        with contextlib.closing(bar):
            for step, found in enumerate(one_behind(answered()), 1):
                yield _to_host(found)
                bar.update(step, {}, 0.0)

    def _step(self, model: Model, batch: Batch, n: int, k: int) -> Signal:
        run = self._run
        return signal_step(
            model,
            place(batch, run.mesh),
            sharding.everywhere(np.float32(1.0 / (n + 1)), run.mesh),
            vocab_size=self.vocab_size,
            k=k,
            space=self._space,
            policy=run.policy,
            mesh=run.mesh,
            table=family.PARTITION,
        )

    def _error(self, models: Sequence[Model], kept: Signals) -> tuple[float, int]:
        """Mean KL(all logits || kept logits) over some tokens, and how many these are."""
        batch, exact = self._rows[0], None
        for n, model in enumerate(models):
            given = None if exact is None else {OTHERS: exact}
            found = self._step(model, batch.replace(signals=given), n, self.vocab_size)
            exact = jax.tree.map(np.asarray, jax.device_get(found))
        learnt_BT = batch.weights > 0
        exact_MV = exact.values_BTK[learnt_BT][:SAMPLE]
        few = kept.of(batch)
        near_MV = np.repeat(few.rest_BT[learnt_BT][:SAMPLE, None], self.vocab_size, axis=1)
        np.put_along_axis(
            near_MV, few.ids_BTK[learnt_BT][:SAMPLE], few.values_BTK[learnt_BT][:SAMPLE], axis=1
        )
        gaps_M = (np.exp(exact_MV) * (exact_MV - near_MV)).sum(axis=1, dtype=np.float64)
        return float(gaps_M.mean()), len(gaps_M)


def _identity(model: Model, described: Blueprint) -> str:
    return store.identity(sharding.to_host(model.params), described.hf_json)


def _look_through(rows: Stream, count: int) -> tuple[np.ndarray, str]:
    """Learnt tokens of each row, by its id, and a digest of what the rows are."""
    counts_R, digest = np.zeros(count, np.int64), hashlib.blake2b(digest_size=16)
    for batch in rows.batches():
        batch = _to_host(batch)
        real_B = batch.ids_B >= 0
        counts_R[batch.ids_B[real_B]] = (batch.weights[real_B] > 0).sum(axis=1)
        for part in (batch.ids_B, batch.tokens_BT, batch.weights, batch.segments_BT):
            digest.update(b"" if part is None else np.ascontiguousarray(part).data)
    return counts_R, digest.hexdigest()


def _everywhere(here: bool) -> bool:
    """Whether all processes have something, so that all of them compute the same."""
    if jax.process_count() > 1:
        return bool(multihost_utils.process_allgather(np.asarray(here)).all())
    return here


def _to_host(tree: Any) -> Any:
    """Whole NumPy arrays, of all processes' rows."""
    if jax.process_count() > 1:
        return multihost_utils.process_allgather(tree, tiled=True)
    return jax.tree.map(np.asarray, jax.device_get(tree))
