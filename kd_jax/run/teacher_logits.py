"""Loads a run's models as teachers, and computes their logits of examples, each row only once.

Logits of a split are read from disk (teachers/store.py) if any run computed them; the others are
computed now, and stored. Rows are in the order of the split.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from kd_jax.data.loader import BucketStream
from kd_jax.errors import UserError
from kd_jax.models import blueprint, family
from kd_jax.run.run import Run
from kd_jax.run.text_logits import cache_settings, folder, identity_of
from kd_jax.teachers.several import average, in_order
from kd_jax.teachers.store import NOT_FINITE, LogitStore
from kd_jax.train import sharding
from kd_jax.train.passes import predict
from kd_jax.types import Model, Params, StoredLogits

log = logging.getLogger(__name__)


class TeacherLogits:
    """The frozen models of a run, and their logits over its splits."""

    def __init__(self, run: Run, given: dict[str, Params]):
        """Stores `given`, parameters by model; entries may be added later, before their use."""
        self._run, self._given = run, given
        self._rows: dict[tuple[str, str], list[np.ndarray | None]] = {}
        self.model = functools.cache(self._model)  # as a teacher, on the mesh
        self._store = functools.cache(self._open)
        self.text: dict[tuple, Any] = {}  # of run/teaching.py: stores of training text

    def of(self, name: str, split: str, ids_N: np.ndarray | None = None) -> list:
        """Returns a model's logits of every row of a split, (C,) in the task's order of classes or
        (2, length). With `ids_N`, only of those rows: others may be None."""
        rows = self._run.tasks[name].rows(split)
        found = self._rows.setdefault((name, split), [None] * len(rows))
        asked = np.arange(len(rows)) if ids_N is None else np.unique(ids_N)
        new = np.array([i for i in asked if found[i] is None], np.int64)
        if len(new):
            order = self._run.order(name)
            for i, logits in zip(new, self._compute(name, split, new), strict=True):
                found[i] = in_order(logits, order)
        return found

    def together(
        self, names: tuple[str, ...], weights: list[float], space: str, split: str, ids_N=None
    ) -> list:
        """Averages several models' logits in `space` (teachers/several.py); rows as in `of`."""
        if len(names) == 1:
            return self.of(names[0], split, ids_N)
        each = [self.of(name, split, ids_N) for name in names]
        return [
            None if any(row is None for row in rows) else average(list(rows), weights, space, np)
            for rows in zip(*each, strict=True)
        ]

    def _compute(self, name: str, split: str, ids_N: np.ndarray) -> list[np.ndarray]:
        run, rows = self._run, self._run.tasks[name].rows(split)
        digests, store = [rows.digests[i] for i in ids_N], self._store(name)
        found = [None] * len(ids_N)
        if store is not None:
            there = (row and row.values_BPK for row in store.read(digests))
            found = [row[0] if row is not None and len(row) == 1 else row for row in there]
        missing_N = np.array([logits is None for logits in found])
        if jax.process_count() > 1:  # hosts may have other files, and compute together
            missing_N = multihost_utils.process_allgather(missing_N).any(axis=0)
        new = np.flatnonzero(missing_N)
        if len(new):
            log.info("%s: logits of %s rows are computed", name, f"{len(new):,}")
            part = BucketStream(
                rows.lengths_N[ids_N[new]],
                run.tasks[name].buckets_of(split),
                lambda ids_B, length: rows.batch(ids_N[new][ids_B], length),
                run.config.eval.batch_size,
                **run.processes,
            )
            computed = predict(self.model(name), part, run.mesh, family.PARTITION)
            for i in new:
                found[i] = computed[int(ids_N[i])]
        self._check_finite(name, split, ids_N, found)
        if len(new) and store is not None:
            logits = [StoredLogits(np.atleast_2d(found[i])) for i in new]
            sizes = [row.values_BPK.shape for row in logits]
            try:
                store.write([digests[i] for i in new], sizes, logits)
            except UserError as error:
                log.warning("teacher logits are kept for this run alone: %s", error)
        return found

    def _check_finite(self, name: str, split: str, ids_N: np.ndarray, found: list) -> None:
        spoilt = ids_N[[not np.isfinite(logits).all() for logits in found]]
        if len(spoilt):
            raise UserError(
                f"{name} {self._run.models[name].name}: its logits of {len(spoilt):,} of "
                f"{len(found):,} rows of {split} are not finite (row {spoilt[0]} is the first); "
                f"{NOT_FINITE}"
            )

    def params(self, name: str) -> Params:
        """Returns the parameters of a model."""
        return self._given[name]

    def _model(self, name: str) -> Model:
        return frozen(self._run, name, self._given[name])

    def _open(self, name: str) -> LogitStore | None:
        gigabytes = cache_settings(self._run)["max_gb"]
        if "cache" not in self._run.config or not gigabytes:
            return None
        own = identity_of(self._run, name, self._given[name])
        return LogitStore(folder(self._run), own, gigabytes)


def given_params(run: Run, name: str) -> Params:
    """Loads, or draws at random, the parameters of a model that no stage trains."""
    model = run.models[name]
    key = jax.random.fold_in(jax.random.key(run.config.seed), 0)
    if model.folder is None:
        init = run.section(name).init
        log.warning("%s has random parameters: config.%s.init=%r", name, name, init)
        return model.draw(key)
    return model.load(key)


def given_teachers(run: Run) -> dict[str, Params]:
    """Loads the parameters of the teachers that no stage trains, by name."""
    return {name: given_params(run, name) for name in run.teachers if name not in run.trained}


def frozen(run: Run, name: str, params: Params) -> Model:
    """Makes a teacher: casts a model's parameters to operand types, and puts them on the mesh."""
    kept = blueprint.stored(params, run.policy)
    return laid_out(Model(kept, run.models[name].abstract().graphdef), run.mesh)


def laid_out(model: Model, mesh: Mesh) -> Model:
    """Puts a model's parameters, from the host or any devices, on a mesh."""
    specs = sharding.param_specs(family.PARTITION, model.params, mesh)
    placed = jax.device_put(model.params, sharding.shardings(specs, mesh))
    return model.replace(params=placed)
