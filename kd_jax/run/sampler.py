"""Writes text with a model that lies on a mesh, on all of its devices.

TextWriter        after any number of prompts, batch after batch
write_on_mesh     after the prompts of one batch
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kd_jax.axes import AXES
from kd_jax.models import family
from kd_jax.models.generate import Rule, Sampling, Written, check_model, padded, write
from kd_jax.train.passes import ahead
from kd_jax.train.sharding import BATCH, Table, everywhere, per_device, place
from kd_jax.types import Array, Model


class Text(NamedTuple):
    """What was written after a prompt."""

    tokens_N: np.ndarray  # int32
    ended: bool  # by a stop token, which is the last one
    logp: float  # log-probability of the tokens at temperature 1, in nats


class TextWriter:
    """Writes after prompts of any lengths, in batches of prompts of similar length."""

    def __init__(self, model: Model, mesh: Mesh, sampling: Sampling, seed: int, rows: int) -> None:
        """Takes a model on the mesh, split by `family.PARTITION`. Batches have `rows` rows, which
        the devices divide."""
        self.sampling, self._rows, self._seed, self._mesh = sampling, rows, seed, mesh
        self._write = functools.partial(write_on_mesh, mesh, family.PARTITION, model)
        self._longest = check_model(model).max_tokens

    def write(self, prompts: Sequence[np.ndarray], numbers: Sequence[int]) -> list[Text]:
        """Writes after each of the prompts; their numbers (below 2^31) and the seed decide the
        draws. All processes call this together with the same prompts, and all get the texts."""
        order = np.argsort([len(prompt) for prompt in prompts], kind="stable")
        found: dict[int, Text] = {}
        batches = self._batches(prompts, np.asarray(numbers), order)
        write = lambda batch: self._write(*batch[1], self._seed, self.sampling)  # noqa: E731
        for (chosen, _), written in ahead(write, batches, self._mesh):
            for row, *own in zip(chosen, *_to_host(written), strict=False):  # others only fill
                found[row] = _text(*own)
        return [found[row] for row in range(len(prompts))]

    def _batches(
        self, prompts: Sequence[np.ndarray], numbers_N: np.ndarray, order_N: np.ndarray
    ) -> Iterator[tuple[np.ndarray, list[np.ndarray]]]:
        each = self._rows // jax.process_count()
        own = slice(jax.process_index() * each, (jax.process_index() + 1) * each)
        for start in range(0, len(order_N), self._rows):
            chosen = order_N[start : start + self._rows]
            filling = self._rows - len(chosen)
            rows = [*(prompts[row] for row in chosen), *[[0]] * filling]
            limits_B = [self.sampling.max_new_tokens] * len(chosen) + [0] * filling
            numbers_B = np.pad(numbers_N[chosen], (0, filling))
            batch = *padded(rows, self._longest), limits_B, numbers_B
            yield chosen, [x[own] for x in batch]


def _to_host(written: Written) -> tuple[np.ndarray, ...]:
    arrays = written.tokens_BN, written.counts_B, written.ended_B, written.logp_BN
    if jax.process_count() > 1:
        return multihost_utils.process_allgather(arrays, tiled=True)
    return jax.device_get(arrays)


def _text(tokens_N: np.ndarray, count: int, ended: bool, logp_N: np.ndarray) -> Text:
    return Text(tokens_N[:count], bool(ended), float(logp_N.sum(dtype=np.float64)))


def write_on_mesh(
    mesh: Mesh,
    table: Table,
    model: Model,
    tokens_BT: np.ndarray,
    lengths_B: np.ndarray,
    limits_B: np.ndarray,
    rows_B: np.ndarray,
    seed: int,
    sampling: Sampling,
) -> Written:
    """Writes after prompts, `models.generate.write`, on all devices of the mesh.

    All processes call this together, each with its own rows, as many as its devices divide, T the
    same in all; on the mesh lie the rows of all of them, of `models.generate.Written`.

    Args:
        table: how the model's parameters are split.
        rows_B: int32 numbers of the rows among those of all processes; a row's draws depend on
            `seed` (0 to 2^32 - 1) and its number alone.
    """
    batch = tokens_BT, lengths_B, limits_B, rows_B
    batch = place(tuple(np.asarray(rows, np.int32) for rows in batch), mesh)
    numbers = everywhere((np.uint32(seed), sampling.rule()), mesh)
    return _write(model, batch, *numbers, room=sampling.max_new_tokens, mesh=mesh, table=table)


def lower(
    mesh: Mesh, table: Table, model: Model, shape: tuple[int, int], sampling: Sampling
) -> jax.stages.Lowered:
    """Lowers the program that writes after prompts of a shape (B, T), from an abstract model that
    knows its place on the mesh; on devices that need not be present."""

    def described(like: np.ndarray, spec: P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=NamedSharding(mesh, spec))

    rows = [np.zeros(shape, np.int32), *[np.zeros(shape[:1], np.int32)] * 3]
    batch = tuple(described(each, BATCH) for each in rows)
    numbers = np.uint32(0), sampling.rule()
    numbers = jax.tree.map(lambda each: described(np.asarray(each), P()), numbers)
    static = dict(room=sampling.max_new_tokens, mesh=mesh, table=table)
    return _write.lower(model, batch, *numbers, **static)


@functools.partial(jax.jit, static_argnames=("room", "mesh", "table"))
def _write(
    model: Model,
    batch: tuple[Array, ...],
    seed: Array,
    rule: Rule,
    *,
    room: int,
    mesh: Mesh,
    table: Table,
) -> Written:
    def local(model, batch, seed, rule):
        return write(model, *batch, seed, rule, room, AXES)

    return per_device(local, mesh, table, (model,), batch, seed, rule)
