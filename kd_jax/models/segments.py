"""Rows that hold several continuations of one beginning (`Batch.segments_BT`): who sees whom, and
at which position a token stands. What comes out of a decoder for a continuation is what it would
give for beginning and continuation in a row of their own, and the beginning is computed once.
"""

import jax
import jax.numpy as jnp

from kd_jax.models.layers import causal_mask, check_length
from kd_jax.types import Array, Batch


def positions(batch: Batch, max_tokens: int) -> Array:
    """Each token's position, int32, (1, T), or (B, T) where there are segments: every segment's
    count goes on from the end of segment 0. Raises UserError for rows longer than `max_tokens`;
    with segments, whoever makes the rows sees to it that no continuation ends beyond them."""
    index_T = jnp.arange(batch.tokens_BT.shape[1])
    if batch.segments_BT is None:
        check_length(len(index_T), max_tokens)
        return index_T[None]
    segments_BT = batch.segments_BT
    shared_B1 = ((segments_BT == 0) & (batch.mask_BT > 0)).sum(axis=1, keepdims=True)
    before_BT = jnp.pad(segments_BT[:, :-1], ((0, 0), (1, 0)))
    starts_BT = jnp.where(segments_BT != before_BT, index_T[None], 0)
    begun_BT = jax.lax.cummax(starts_BT, axis=1)  # where the token's segment begins
    places_BT = jnp.where(segments_BT == 0, index_T[None], shared_B1 + index_T[None] - begun_BT)
    return jnp.minimum(places_BT, max_tokens - 1)  # padding


def mask(batch: Batch) -> Array:
    """Which keys (last axis) a query sees, bool, (B, 1, T, T): tokens at or before it, of segment 0
    and of its own segment."""
    causal_B1TT = causal_mask(batch.mask_BT)
    if batch.segments_BT is None:
        return causal_B1TT
    keys_B11T = batch.segments_BT[:, None, None, :]
    return causal_B1TT & ((keys_B11T == 0) | (keys_B11T == batch.segments_BT[:, None, :, None]))
