"""Keeps the keys and values of a decoder's earlier tokens, and attends to them from one more token.

Places come last: for a few queries, XLA's CPU backend then multiplies and sums along them without a
copy of the cache, three times as fast as with a batch of small matrix products.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from kd_jax.models.layers import MASKED
from kd_jax.precision import Policy
from kd_jax.types import Array, Heads

FREE = 2**30  # the position of a place without a token: after all others


class Past(struct.PyTreeNode):
    """Holds one layer's keys and values, with room for S tokens, and what all layers share."""

    k_BGKS: Array
    v_BGKS: Array
    places_BS: Array  # int32: the tokens' positions, the new one's included
    place_B1: Array  # int32: the new token's
    start: Array  # int32 scalar: the new one is written there

    def extended(self, k_B1GK: Array, v_B1GK: Array) -> Past:
        """Adds the new token's keys and values."""
        k_BGKS, v_BGKS = (
            jax.lax.dynamic_update_slice_in_dim(
                room, new.transpose(0, 2, 3, 1).astype(room.dtype), self.start, axis=3
            )
            for room, new in ((self.k_BGKS, k_B1GK), (self.v_BGKS, v_B1GK))
        )
        return self.replace(k_BGKS=k_BGKS, v_BGKS=v_BGKS)

    def attend(self, q_B1HK: Array, window: int | None, policy: Policy) -> Array:
        """Computes softmax(q k) v over the tokens up to the new one, (B, 1, H, K); with a window,
        over so many of them."""
        B, _, H, K = q_B1HK.shape
        seen_BS = self.places_BS <= self.place_B1
        if window is not None:
            seen_BS &= self.places_BS > self.place_B1 - window
        q_BGJK1 = q_B1HK.reshape(B, self.k_BGKS.shape[1], -1, K, 1)
        # bfloat16 numbers have exact products in float32.
        q, k, v = (x.astype(jnp.float32) for x in (q_BGJK1, self.k_BGKS, self.v_BGKS))
        scores_BGJS = (q * k[:, :, None]).sum(axis=3)
        scores_BGJS += jnp.where(seen_BS, 0.0, MASKED)[:, None, None]
        weights_BGJS = jnp.exp(scores_BGJS - scores_BGJS.max(axis=-1, keepdims=True))
        sums_BGJ1 = weights_BGJS.sum(axis=-1, keepdims=True)
        y_BGJK = (weights_BGJS[:, :, :, None] * v[:, :, None]).sum(axis=-1) / sums_BGJ1
        return y_BGJK.reshape(B, 1, H, K).astype(policy.activation)


class Cache(struct.PyTreeNode):
    """Holds all layers' keys and values; `Decoder.start` makes it, `.extend` adds to it."""

    past: tuple[tuple[Array, Array], ...]  # of every layer: keys and values, (B, G, K, S)
    places_BS: Array  # int32 positions; FREE where no token is
    used: Array  # int32 scalar: places that are filled, in every row the same ones
    lengths_B: Array  # int32: tokens of each row, without padding

    def next(self) -> Cache:
        """Takes the next place of every row for one more token."""
        places_BS = jax.lax.dynamic_update_slice_in_dim(
            self.places_BS, self.lengths_B[:, None], self.used, axis=1
        )
        return Cache(self.past, places_BS, self.used + 1, self.lengths_B + 1)

    def of_layer(self, layer: int) -> Past:
        """Returns what the attention of a layer needs, after `next`."""
        shared = self.places_BS, self.lengths_B[:, None] - 1, self.used - 1
        return Past(*self.past[layer], *shared)


def filled(layers: tuple[Heads, ...], real_BT: Array, room: int) -> Cache:
    """Makes the cache of rows of tokens from their keys and values, with room for more of them.

    Padding (where `real_BT`, bool, is False) follows a row's tokens.
    """
    T = real_BT.shape[1]
    past = tuple(
        tuple(
            jnp.pad(x.transpose(0, 2, 3, 1), ((0, 0), (0, 0), (0, 0), (0, room)))
            for x in (heads.k_BTGK, heads.v_BTGK)
        )
        for heads in layers
    )
    places_BT = jnp.where(real_BT, jnp.arange(T, dtype=jnp.int32), FREE)
    places_BS = jnp.pad(places_BT, ((0, 0), (0, room)), constant_values=FREE)
    return Cache(past, places_BS, jnp.int32(T), real_BT.sum(axis=1, dtype=jnp.int32))
