"""Computes dropout with a mask that is a hash of the element's index, without stored random bits.

`jax.random.bernoulli` spends twenty rounds of threefry on every element and autodiff keeps the
mask for the backward pass. Here element i of call site s survives when
mix(mix(i ^ seed) + s) >= rate * 2^32, with the 32-bit finalizer "lowbias32" of Chris Wellons'
hash prospector as `mix`. That fuses into the surrounding elementwise code, and the backward pass
computes the mask again, so dropout costs no memory.
"""

import functools
import math

import jax
import jax.numpy as jnp

from kd_jax.types import Array


def _mix(x: Array) -> Array:
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def keep_mask(shape: tuple[int, ...], rate: float, seed: Array, site: int) -> Array:
    """Draws bools of `shape`, True with probability 1 - rate: a function of (seed, site, index)."""
    # One iota a dimension: a flat one reshaped costs a division per element.
    index = jnp.uint32(0)
    for axis in range(len(shape)):
        stride = jnp.uint32(math.prod(shape[axis + 1 :]) % 2**32)
        index = index + jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * stride
    threshold = jnp.uint32(min(round(rate * 2**32), 2**32 - 1))
    return _mix(_mix(index ^ seed) + _mix(seed + jnp.uint32(site))) >= threshold


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 3))
def _drop(x, rate, seed, site):
    keep = keep_mask(x.shape, rate, seed, site)
    return jnp.where(keep, x / (1.0 - rate), 0.0).astype(x.dtype)


def _drop_fwd(x, rate, seed, site):
    return _drop(x, rate, seed, site), seed


def _drop_bwd(rate, site, seed, g):
    return _drop(g, rate, seed, site), None


_drop.defvjp(_drop_fwd, _drop_bwd)


def dropout(x: Array, rate: float, seed: Array | None, site: int) -> Array:
    """Drops x (Srivastava et al. 2014): 0 with probability `rate`, else x / (1 - rate).

    `seed` is a uint32 scalar, new at every step; None switches dropout off. `site` tells the
    calls of one model apart.
    """
    if seed is None or rate == 0.0:
        return x
    return _drop(x, rate, seed, site)
