"""Runs models over data without training: held-out metrics, logits, log-likelihoods.

A batch's results are read only when the next batch has been started, so devices never wait.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from kd_jax.metrics import likelihood
from kd_jax.objectives.logits import Mixture, draw, head_of, in_chunks, sparse, stored
from kd_jax.precision import Policy
from kd_jax.train.sharding import Table, per_device, place
from kd_jax.train.step import Program, Teacher, global_denominators, ratios
from kd_jax.types import Array, Batch, Model, Ratio, StoredLogits

S, T = TypeVar("S"), TypeVar("T")

# That ask a CPU for steps. XLA's CPU backend runs what one thread asks for one after the other, and
# leaves processors idle where a batch is small; steps know nothing of each other.
_THREADS = 2
_STATIC = ("vocab_size", "k", "drawn", "space", "policy", "mesh", "table")  # of `log_probs_step`
CHUNK_LOGITS = 2**23  # of `log_probs_step`: logits of a chunk of rows, 32 MB


def delayed(results: Iterable[T], by: int = 1) -> Iterator[T]:
    """Hands out the same results, each when the next `by` ones have been asked for."""
    pending: deque[T] = deque()
    for result in results:
        pending.append(result)
        if len(pending) > by:
            yield pending.popleft()
    yield from pending


def ahead(step: Callable[[S], T], given: Iterable[S], mesh: Mesh) -> Iterator[tuple[S, T]]:
    """Runs a step of the mesh on everything given, and yields it and what the step returned, in
    their order, once the next steps are under way."""
    run = lambda one: (one, step(one))  # noqa: E731
    queued = mesh.devices.flat[0].platform != "cpu"  # whatever one thread asks for
    if queued or mesh.size > 1:  # of several devices, all do everything in the same order
        yield from delayed(map(run, given))
        return
    with ThreadPoolExecutor(_THREADS) as threads:
        futures = (threads.submit(lambda one: jax.block_until_ready(run(one)), x) for x in given)
        yield from (future.result() for future in delayed(futures, _THREADS))


def evaluate(
    student: Model, stream, teacher: Teacher | None, program: Program, by: str = "token"
) -> dict[str, float]:
    """Computes the mean of each term of `program.objective` over the stream, weighted by token, in
    float64; `by` "batch": the mean of the batches' means."""
    totals: dict[str, np.ndarray] = {}
    step = lambda batch: eval_step(student, place(batch, program.mesh), teacher, program=program)  # noqa: E731
    for _, terms in ahead(step, stream.batches(), program.mesh):
        for name, ratio in jax.device_get(terms).items():
            pair = np.array([ratio.total, ratio.weight], np.float64)
            if by == "batch":
                pair /= max(pair[1], 1e-30)
            totals[name] = totals.get(name, 0.0) + pair
    return {name: float(total / max(weight, 1e-30)) for name, (total, weight) in totals.items()}


def predict(
    model: Model, batches: Iterable[Batch], mesh: Mesh, table: Table
) -> dict[int, np.ndarray]:
    """Computes the logits of every row of the batches, by the row's id: (C,) where a row has
    one output, (P, length) for P outputs over its tokens, padding cut off. Float32.

    All processes call this together, and all get every row.
    """
    found: dict[int, np.ndarray] = {}
    step = lambda batch: predict_step(model, place(batch, mesh), mesh=mesh, table=table)  # noqa: E731
    for batch, logits_BPC in ahead(step, batches, mesh):
        lengths_B = batch.mask_BT.sum(axis=1).astype(np.int32)
        spans = batch.labels.shape[1] > 1
        for row, length, logits_PC in _by_row(batch.ids_B, lengths_B, logits_BPC):
            found[row] = logits_PC[:, :length].copy() if spans else logits_PC[0].copy()
    return found


def log_likelihoods(
    model: Model, batches: Iterable[Batch], segments: int, policy: Policy, mesh: Mesh, table: Table
) -> dict[int, np.ndarray]:
    """Computes the log-likelihoods of each row's K segments, by the row's id: (K,) float32 nats.

    See `metrics.likelihood.of_segments`.

    All processes call this together, and all get every row.
    """
    found: dict[int, np.ndarray] = {}
    how = dict(segments=segments, policy=policy, mesh=mesh, table=table)
    step = lambda batch: likelihood_step(model, place(batch, mesh), **how)  # noqa: E731
    for batch, sums_BK in ahead(step, batches, mesh):
        found.update(_by_row(batch.ids_B, sums_BK))
    return found


def _by_row(ids_B: np.ndarray, *arrays: Any) -> Iterator[tuple]:
    """Yields each row's id and its row of every array, for all processes' rows, but not those that
    fill a batch up."""
    arrays = ids_B, *arrays
    if jax.process_count() > 1:
        arrays = multihost_utils.process_allgather(arrays, tiled=True)
    for row, *parts in zip(*jax.device_get(arrays), strict=True):
        if row >= 0:
            yield int(row), *parts


@functools.partial(jax.jit, static_argnames="program")
def eval_step(
    student: Model, batch: Batch, teacher: Teacher | None, *, program: Program
) -> dict[str, Ratio]:
    """Computes every term of `program.objective` on one batch, as Ratios over all devices, without
    dropout."""
    objective = program.objective

    def local(student, teacher, batch):
        batch = objective.dense_labels(batch)
        targets = None if teacher is None else teacher(batch)
        denominators = global_denominators(objective, batch)
        ones = dict.fromkeys(objective.names, jnp.float32(1.0))
        _, totals = objective({}, student(batch), targets, batch, ones, {})
        return ratios(totals, denominators)

    return per_device(local, program.mesh, program.table, (student, teacher), batch, out=P())


@functools.partial(jax.jit, static_argnames=("mesh", "table"))
def predict_step(model: Model, batch: Batch, *, mesh: Mesh, table: Table) -> Array:
    """Computes float32 logits of a head that predicts once a row, (B, P, C), without dropout."""
    local = lambda model, batch: model(batch).logits  # noqa: E731
    return per_device(local, mesh, table, (model,), batch)


@functools.partial(jax.jit, static_argnames=("segments", "policy", "mesh", "table"))
def likelihood_step(
    model: Model, batch: Batch, *, segments: int, policy: Policy, mesh: Mesh, table: Table
) -> Array:
    """Computes `metrics.likelihood.of_segments` of one batch, (B, K); dropout off."""

    def local(model, batch):
        return likelihood.of_segments(model(batch), batch, segments, policy)

    return per_device(local, mesh, table, (model,), batch)


@functools.partial(jax.jit, static_argnames=_STATIC)
def log_probs_step(
    model: Model,
    batch: Batch,
    share: Array,
    *,
    vocab_size: int,
    k: int,
    drawn: bool = False,
    space: str,
    policy: Policy,
    mesh: Mesh,
    table: Table,
) -> StoredLogits:
    """Computes a model's log-probabilities at every label of a batch; if stored logits of "others"
    come with the batch, the mean of both, with weight `share` (float32 scalar) for the model.

    Args:
        model: a model with at least `vocab_size` ids; those beyond are padding.
        k: number of largest log-probabilities to keep; vocab_size: all, exactly.
        drawn: keeps k ids instead, drawn by their probabilities (`objectives.logits.draw`), which
            depend on a row's tokens and the position alone.
        space: the space of the mean, logits or probabilities.
        policy: types of the product that makes logits.
    """

    def local(model, batch, share):
        own = head_of(model(batch)).cut(vocab_size)
        before = None if batch.stored is None else stored(batch.stored["others"], vocab_size)
        rows = len(own.features_ND)
        size = min(rows, max(policy.least_rows, CHUNK_LOGITS // vocab_size))

        def chunk(parts):
            own_rows, before_rows, seeds_C = parts
            logits_CV = own.logits(own_rows, policy)
            if before is not None:
                before_CV = before.logits(before_rows, policy)
                logits_CV = Mixture(logits_CV, before_CV, share, space).logits_CV
            if drawn:
                return StoredLogits(None, draw(logits_CV, k, seeds_C))
            if k == vocab_size:
                return StoredLogits(jax.nn.log_softmax(logits_CV, axis=1))
            found = sparse(logits_CV, k)
            return StoredLogits(found.values_NK, found.ids_NK, found.rest_N)

        parts = own.rows, None if before is None else before.rows, _seeds(batch).reshape(-1)
        found = jax.lax.map(chunk, in_chunks(parts, size))
        shape = batch.labels.shape

        def whole(array):
            flat = array.reshape(-1, *array.shape[2:])[:rows]
            return flat.reshape(*shape, *flat.shape[1:])

        return jax.tree.map(whole, found)

    return per_device(local, mesh, table, (model,), batch, share)


def _seeds(batch: Batch) -> Array:
    """Makes a seed for every label of a batch of its row's tokens and its number, uint32 (B, P)."""
    T, slots = batch.tokens_BT.shape[1], batch.labels.shape[1]
    odd_T = (2 * jnp.arange(T, dtype=jnp.uint32) + 1) * jnp.uint32(0x9E3779B1)
    row_B = jnp.sum(batch.tokens_BT.astype(jnp.uint32) * odd_T[None], axis=1, dtype=jnp.uint32)
    return row_B[:, None] + jnp.arange(slots, dtype=jnp.uint32)[None] * jnp.uint32(0x85EBCA6B)
