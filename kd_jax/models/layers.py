"""Defines the layers that encoders and decoders share, without any randomness.

Parameters start as zeros of the right shape (`family.build` draws the values), so a module can be
built abstractly. Linear kernels are (in, out); embeddings are (rows, D).
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from kd_jax.errors import UserError
from kd_jax.models.model_config import BlockShape
from kd_jax.models.replacement import Either
from kd_jax.precision import Policy, einsum
from kd_jax.types import Array, Heads

MASKED = -1e9  # a finite score, so that a row without any token gives an even softmax and no NaN
Layers = tuple[tuple[Array, ...], tuple[Heads, ...]]  # (hidden, attention) of `ModelOutput`


def _gelu(x):
    return 0.5 * x * (1.0 + jax.lax.erf(x * math.sqrt(0.5)))


def _gelu_tanh(x):
    return jax.nn.gelu(x, approximate=True)


# The names are those of HF's ACT2FN.
ACTIVATIONS = {
    "gelu": _gelu,
    "gelu_python": _gelu,
    "gelu_new": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "gelu_python_tanh": _gelu_tanh,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}


def activation(name: str):
    """Finds an activation function by its HF name. Raises UserError listing what exists."""
    if name not in ACTIVATIONS:
        raise UserError(f"unknown activation {name!r}; have: {', '.join(sorted(ACTIVATIONS))}")
    return ACTIVATIONS[name]


class Linear(nnx.Module):
    """Maps (B, T, in) to (B, T, out)."""

    def __init__(self, d_in: int, d_out: int, policy: Policy, bias: bool = True):
        self.kernel = nnx.Param(jnp.zeros((d_in, d_out)))
        self.bias = nnx.Param(jnp.zeros((d_out,))) if bias else None
        self.policy = policy

    def __call__(self, x_BTD: Array) -> Array:
        y_BTF = einsum("btd,df->btf", x_BTD, self.kernel[...], self.policy)
        if self.bias is None:
            return y_BTF
        return y_BTF + self.bias[...].astype(y_BTF.dtype)[None, None]


class LayerNorm(nnx.Module):
    """Normalizes the last axis (layer norm, Ba et al. 2016), with statistics in float32.

    Mean and mean square are taken in one pass over the row, which XLA fuses into one loop.
    """

    def __init__(self, width: int, eps: float):
        self.scale = nnx.Param(jnp.ones((width,)))
        self.bias = nnx.Param(jnp.zeros((width,)))
        self.eps = eps

    def __call__(self, x_BTD: Array) -> Array:
        x = x_BTD.astype(jnp.float32)
        mean = x.mean(-1, keepdims=True)
        variance = jnp.maximum((x * x).mean(-1, keepdims=True) - mean * mean, 0.0)
        y = (x - mean) * jax.lax.rsqrt(variance + self.eps)
        y = y * self.scale[...][None, None] + self.bias[...][None, None]
        return y.astype(x_BTD.dtype)


class RmsNorm(nnx.Module):
    """Divides by the root mean square of the last axis (Zhang and Sennrich 2019, arXiv:1910.07467),
    in float32."""

    def __init__(self, width: int, eps: float):
        self.scale = nnx.Param(jnp.ones((width,)))
        self.eps = eps

    def __call__(self, x_BTD: Array) -> Array:
        x = x_BTD.astype(jnp.float32)
        x = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + self.eps)
        return (x * self.scale[...][None, None]).astype(x_BTD.dtype)


class Embedding(nnx.Module):
    """Looks up rows of a table by ids."""

    def __init__(self, rows: int, width: int, policy: Policy):
        self.embedding = nnx.Param(jnp.zeros((rows, width)))
        self.policy = policy

    def __call__(self, ids: Array) -> Array:
        return self.embedding[...][ids].astype(self.policy.activation)


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

    The mask is a hash of the element's index: no random bits are stored or drawn.
    `jax.random.bernoulli` spends twenty rounds of threefry on every element and autodiff keeps the
    mask for the backward pass. Here element i of call site s survives when
    mix(mix(i ^ seed) + s) >= rate * 2^32, with the 32-bit finalizer "lowbias32" of Chris Wellons'
    hash prospector as `mix`. That fuses into the surrounding elementwise code, and the backward
    pass computes the mask again, so dropout costs no memory.
    """
    if seed is None or rate == 0.0:
        return x
    return _drop(x, rate, seed, site)


class Mlp(nnx.Module):
    """Applies two linear layers with an activation between them.

    If it is gated (Shazeer 2020, arXiv:2002.05202), the activation is applied to a third layer,
    `gate`, and multiplied with `up`.
    """

    def __init__(
        self,
        width: int,
        inner: int,
        activation_name: str,
        rate: float,
        policy: Policy,
        gated: bool = False,
        bias: bool = True,
    ):
        self.gate = Linear(width, inner, policy, bias) if gated else None
        self.up = Linear(width, inner, policy, bias)
        self.down = Linear(inner, width, policy, bias)
        self.activation = activation(activation_name)
        self.rate = rate

    def __call__(self, x_BTD: Array, seed: Array | None, site: int) -> Array:
        y_BTF = self.up(x_BTD)
        if self.gate is None:
            y_BTF = self.activation(y_BTF)
        else:
            y_BTF = self.activation(self.gate(x_BTD)) * y_BTF
        return dropout(self.down(y_BTF), self.rate, seed, site)


class Bottleneck(nnx.Module):
    """A block x + up(inner(down(x))), `inner` a block of another width, with its dropout sites."""

    def __init__(self, config: Any, shape: BlockShape, inner: nnx.Module):
        self.down = Linear(config.width, shape.width, config.policy)
        self.inner = inner
        self.up = Linear(shape.width, config.width, config.policy)

    def __call__(
        self, x_BTD: Array, mask: Any, seed: Array | None, site: int
    ) -> tuple[Array, Heads]:
        y, heads = self.inner(self.down(x_BTD), mask, seed, site)
        return x_BTD + self.up(y), heads


def run_blocks(
    blocks, x_BTD, mask, seed, sites: int, remat: bool, predecessors=None, replaced_L=None
) -> Layers:
    """Runs blocks one after the other: (x_BTD and each block's output, each block's heads).

    `mask` is passed to the blocks: a boolean array, or an `attention.Scope`. A block takes `sites`
    dropout sites, starting at 1. With `remat`, blocks are recomputed in the backward pass. With
    `predecessors` (models/replacement.py) and `replaced_L` (bool), a block is replaced by its
    predecessors where that is False.
    """
    hidden, attention = [x_BTD], []
    for i, block in enumerate(blocks):
        if predecessors is not None and replaced_L is not None and len(predecessors[i]):
            block = Either(block, predecessors[i], replaced_L[i])
        run = jax.checkpoint(block, static_argnums=3) if remat else block
        x_BTD, heads = run(x_BTD, mask, seed, 1 + sites * i)
        hidden.append(x_BTD)
        attention.append(heads)
    return tuple(hidden), tuple(attention)


def key_mask(mask_BT: Array) -> Array:
    """Masks padding: True where a key is a token, bool (B, 1, 1, T)."""
    return (mask_BT > 0)[:, None, None, :]


def causal_mask(mask_BT: Array) -> Array:
    """Masks padding and later tokens: query t sees those at or before t, bool (B, 1, T, T)."""
    length = mask_BT.shape[1]
    lower_TT = jnp.tril(jnp.ones((length, length), bool))
    return key_mask(mask_BT) & lower_TT[None, None]


def check_length(length: int, max_tokens: int) -> None:
    """Raises UserError for rows longer than the position table, which a lookup would clamp."""
    if length > max_tokens:
        raise UserError(
            f"rows of {length} tokens, but the model has positions for {max_tokens}: "
            f"set seq_len to at most {max_tokens}"
        )


def gather(x_BTD: Array, positions_BP: Array | None) -> Array:
    """Selects tokens at positions, (B, P, D); all tokens if positions are None."""
    if positions_BP is None:
        return x_BTD
    return jnp.take_along_axis(x_BTD, positions_BP[:, :, None], axis=1)
