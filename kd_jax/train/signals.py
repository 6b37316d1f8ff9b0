"""Logits that training reads again and again, computed in one pass: a teacher's, and the mean of an
ensemble's members, to which each pass adds one."""

from __future__ import annotations

import functools

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from kd_jax.objectives import chunks
from kd_jax.objectives.sources import Mixed, head_of, sparse, stored
from kd_jax.precision import Policy
from kd_jax.train import sharding
from kd_jax.types import Array, Batch, Model, Signal

CHUNK_LOGITS = 2**23  # of a chunk of rows: 32 MB


@functools.partial(jax.jit, static_argnames=("vocab_size", "k", "space", "policy", "mesh", "table"))
def signal_step(
    model: Model,
    batch: Batch,
    share: Array,
    *,
    vocab_size: int,
    k: int,
    space: str,
    policy: Policy,
    mesh: Mesh,
    table: sharding.Table,
) -> Signal:
    """The model's log-probabilities of every token of a batch; where the batch has a signal
    "others", the mean of both, of which `share` (float32 scalar) is the model's.

    Args:
        model: of at least `vocab_size` ids; those beyond are padding.
        k: how many logits of a token are kept, by size; vocab_size: all, exactly.
        space: that of the mean, logits or probabilities.
        policy: types of the product that makes logits.
    """
    specs = sharding.param_specs(table, model.params, mesh)

    def local(params, batch, share):
        output = Model(sharding.gather(params, specs), model.graphdef)(batch)
        own = head_of(output).cut(vocab_size)
        before = None if batch.signals is None else stored(batch.signals["others"], vocab_size)
        rows = len(own.features_ND)
        size = min(rows, max(8, CHUNK_LOGITS // vocab_size))

        def chunk(parts):
            own_rows, before_rows = parts
            logits_CV = own.logits(own_rows, policy)
            if before is not None:
                before_CV = before.logits(before_rows, policy)
                logits_CV = Mixed(logits_CV, before_CV, share, space).logits_CV
            if k == vocab_size:
                return Signal(jax.nn.log_softmax(logits_CV, axis=1))
            found = sparse(logits_CV, k)
            return Signal(found.values_NK, found.ids_NK, found.rest_N)

        parts = own.rows, None if before is None else before.rows
        found = jax.lax.map(chunk, chunks.split(parts, size))
        shape = batch.tokens_BT.shape

        def whole(array):
            flat = array.reshape(-1, *array.shape[2:])[:rows]
            return flat.reshape(*shape, *flat.shape[1:])

        return jax.tree.map(whole, found)

    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(specs, sharding.BATCH, P()),
        out_specs=sharding.BATCH,
        check_vma=False,
    )(model.params, batch, share)
