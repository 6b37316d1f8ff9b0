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
from jax.ad_checkpoint import checkpoint_name

from kd_jax import axes
from kd_jax.errors import UserError
from kd_jax.models.model_config import BlockShape
from kd_jax.precision import Policy, product, rows_product
from kd_jax.types import Array, Heads

PRODUCT = "product"  # the name of results of linear layers, for `jax.checkpoint`
MASKED = -1e9  # a finite score, so that a row without any token gives an even softmax and no NaN


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
    "linear": lambda x: x,
}


def activation(name: str):
    """Finds an activation function by its HF name. Raises UserError listing what exists."""
    if name not in ACTIVATIONS:
        raise UserError(f"unknown activation {name!r}; have: {', '.join(sorted(ACTIVATIONS))}")
    return ACTIVATIONS[name]


class Linear(nnx.Module):
    """Maps (B, T, in) to (B, T, out).

    On a mesh the kernel may be a part of the whole one. Parts of its rows over `fsdp` are gathered
    here, in the operands' type, and again in the backward pass, where the gradient is summed and
    scattered at once: no device ever holds more than one whole kernel. Over `model` it may have
    some of the columns, and the bias too: the output is that part, and the input must have gone
    through `axes.shared`. Or some of the rows, which x then has too: the output is summed.
    """

    def __init__(self, d_in: int, d_out: int, policy: Policy, bias: bool = True):
        self.kernel = nnx.Param(jnp.zeros((d_in, d_out)))
        self.bias = nnx.Param(jnp.zeros((d_out,))) if bias else None
        self.d_in, self.d_out = d_in, d_out
        self.policy = policy

    @property
    def in_columns(self) -> bool:
        """Tells whether this device has only some columns of the kernel."""
        return self.kernel.shape[1] < self.d_out

    def __call__(self, x_BTD: Array) -> Array:
        y_BTF = _linear(x_BTD, self.kernel[...], self.policy)
        if x_BTD.shape[-1] < self.d_in:
            y_BTF = axes.summed(y_BTF, (axes.MODEL,))
        return y_BTF if self.bias is None else _add_bias(y_BTF, self.bias[...])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _linear(x_BTD: Array, part: Array, policy: Policy) -> Array:
    kernel = _whole(part, x_BTD, policy)
    return product("btd,df->btf", x_BTD, kernel, policy.operand).astype(policy.activation)


def _whole(part: Array, x_BTD: Array, policy: Policy) -> Array:
    """Gathers the rows of a kernel that fit x, unless they are there."""
    part = part.astype(policy.operand)
    return part if part.shape[0] == x_BTD.shape[-1] else axes.gathered(part, axes.FSDP)


def _linear_fwd(x_BTD, part, policy):
    return checkpoint_name(_linear(x_BTD, part, policy), PRODUCT), (x_BTD, part)


def _linear_bwd(policy, residual, g_BTF):
    x_BTD, part = residual
    split = part.shape[0] < x_BTD.shape[-1]
    if split:  # what the forward pass gathered is gone
        part, g_BTF = jax.lax.optimization_barrier((part, g_BTF))
    dx_BTD = product("btf,df->btd", g_BTF, _whole(part, x_BTD, policy), policy.operand)
    rows = (x.reshape(-1, x.shape[-1]) for x in (x_BTD, g_BTF))
    dw_DF = rows_product(*rows, policy)
    if split:
        dw_DF = axes.scattered(dw_DF.astype(policy.reduction), axes.FSDP)
    return dx_BTD.astype(x_BTD.dtype), dw_DF.astype(part.dtype)


_linear.defvjp(_linear_fwd, _linear_bwd)


@jax.custom_vjp
def _add_bias(y_BTF: Array, bias_F: Array) -> Array:
    return y_BTF + bias_F.astype(y_BTF.dtype)[None, None]


def _add_bias_bwd(bias_F, g_BTF):  # float32 sums, whatever the activations are
    return g_BTF, jnp.sum(g_BTF, axis=(0, 1), dtype=jnp.float32).astype(bias_F.dtype)


_add_bias.defvjp(lambda y, bias: (_add_bias(y, bias), bias), _add_bias_bwd)


class LayerNorm(nnx.Module):
    """Normalizes the last axis (layer norm, Ba et al. 2016), with statistics in float32.

    Mean and mean square are taken in one pass over the row, which XLA fuses into one loop.
    """

    def __init__(self, width: int, eps: float, bias: bool = True):
        self.scale = nnx.Param(jnp.ones((width,)))
        self.bias = nnx.Param(jnp.zeros((width,))) if bias else None
        self.eps = eps

    def __call__(self, x_BTD: Array) -> Array:
        x = x_BTD.astype(jnp.float32)
        mean = x.mean(-1, keepdims=True)
        variance = jnp.maximum((x * x).mean(-1, keepdims=True) - mean * mean, 0.0)
        y = (x - mean) * jax.lax.rsqrt(variance + self.eps)
        y = y * self.scale[...][None, None]
        y = y if self.bias is None else y + self.bias[...][None, None]
        return y.astype(x_BTD.dtype)


class RmsNorm(nnx.Module):
    """Divides by the root mean square of the last axis (Zhang and Sennrich 2019, arXiv:1910.07467),
    in float32. The parameter is the scale, or with `offset` (Gemma) what it is more than 1.
    """

    def __init__(self, width: int, eps: float, offset: bool = False):
        self.scale = None if offset else nnx.Param(jnp.ones((width,)))
        self.offset = nnx.Param(jnp.zeros((width,))) if offset else None
        self.width = width
        self.eps = eps

    def __call__(self, x_BTD: Array, parts: bool = False) -> Array:
        """Normalizes (..., D). With `parts`, devices along `model` have other heads of x: whole
        ones to normalize each for itself, or parts of D, which they normalize together."""
        scale = 1.0 + self.offset[...] if self.scale is None else self.scale[...]
        x = x_BTD.astype(jnp.float32)
        square = (x * x).mean(-1, keepdims=True)
        if parts:
            scale = axes.shared(scale, (axes.MODEL,))
        if x.shape[-1] < self.width:
            square = axes.summed(square * (x.shape[-1] / self.width), (axes.MODEL,))
            square = axes.shared(square, (axes.MODEL,))
            scale = axes.own(scale, (axes.MODEL,))
        x = x * jax.lax.rsqrt(square + self.eps)
        return (x * scale.reshape(*(1,) * (x.ndim - 1), -1)).astype(x_BTD.dtype)


class Embedding(nnx.Module):
    """Looks up rows of a table by ids; on a mesh the table may be a part of the whole one's rows.

    Then each device looks up the ids of all devices that share the table in its own part, and the
    results are summed and scattered: no table is gathered.
    """

    def __init__(self, rows: int, width: int, policy: Policy):
        self.embedding = nnx.Param(jnp.zeros((rows, width)))
        self.rows = rows
        self.policy = policy

    def __call__(self, ids_BT: Array) -> Array:
        table = self.embedding[...]
        if table.shape[0] >= self.rows:
            return table[ids_BT].astype(self.policy.activation)
        return _look_up(table, ids_BT, self.policy.activation)


LOOKED_UP = 2**27  # numbers that a look-up in parts of a table holds at a time


def _pieces(ids_BT: Array, width: int) -> int:
    """Counts the pieces of rows' tokens that are looked up one after the other."""
    B, T = ids_BT.shape
    pieces = -(-axes.size(axes.FSDP) * B * T * width // LOOKED_UP)
    return next(n for n in range(min(pieces, T), T + 1) if T % n == 0)


def _own_rows(ids_BT: Array, size: int) -> tuple[Array, Array]:
    """Gathers the ids of all devices that share a table: (row of this device's part, whether it is
    there)."""
    start = axes.index(axes.VOCAB).astype(jnp.int32) * size
    ids_BT = axes.gathered(ids_BT, axes.FSDP) - start
    return jnp.clip(ids_BT, 0, size - 1), (ids_BT >= 0) & (ids_BT < size)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _look_up(part_VD: Array, ids_BT: Array, dtype: str) -> Array:
    B, T = ids_BT.shape

    def piece(ids_BS):
        rows, here = _own_rows(ids_BS, len(part_VD))
        x_BSD = jnp.where(here[..., None], part_VD[rows].astype(dtype), 0)
        return axes.scattered(axes.total(x_BSD, (axes.MODEL,)), axes.FSDP)

    count = _pieces(ids_BT, part_VD.shape[1])
    x = jax.lax.map(piece, ids_BT.reshape(B, count, T // count).swapaxes(0, 1))
    return x.swapaxes(0, 1).reshape(B, T, -1)


def _look_up_bwd(dtype, residual, g_BTD):
    part_VD, ids_BT = residual
    B, T = ids_BT.shape

    def piece(sums_VD, piece):
        ids_BS, g_BSD = piece
        rows, here = _own_rows(ids_BS, len(part_VD))
        g_BSD = axes.gathered(g_BSD, axes.FSDP).astype(jnp.float32)
        return sums_VD.at[rows].add(jnp.where(here[..., None], g_BSD, 0.0)), None

    count = _pieces(ids_BT, part_VD.shape[1])
    pieces = (x.reshape(B, count, T // count, *x.shape[2:]).swapaxes(0, 1) for x in (ids_BT, g_BTD))
    zeros_VD = jnp.zeros(part_VD.shape, jnp.float32)
    sums_VD, _ = jax.lax.scan(piece, zeros_VD, tuple(pieces))
    return sums_VD.astype(part_VD.dtype), None


_look_up.defvjp(lambda part, ids, dtype: (_look_up(part, ids, dtype), (part, ids)), _look_up_bwd)


def mix(x: Array) -> Array:
    """Scrambles uint32 numbers: the finalizer "lowbias32" of Chris Wellons' hash prospector."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def survives(index: Array, rate: float, seed: Array, site: Array) -> Array:
    """Tells, with probability 1 - rate, whether dropout keeps the elements with these numbers
    (uint32): bools, a function of (seed, site, index)."""
    threshold = jnp.uint32(min(round(rate * 2**32), 2**32 - 1))
    return mix(mix(index ^ seed) + mix(seed + site)) >= threshold


def keep_mask(
    shape: tuple[int, ...],
    rate: float,
    seed: Array,
    site: Array,
    whole: tuple[int, ...] | None = None,
    first: Array | int = 0,
) -> Array:
    """Draws bools of `shape`, True with probability 1 - rate: a function of (seed, site, index).

    They may be a part of those of an array `whole`, from its element number `first` on.
    """
    # One iota a dimension: a flat one reshaped costs a division per element.
    index, whole = jnp.uint32(first), whole or shape
    for axis in range(len(shape)):
        stride = jnp.uint32(math.prod(whole[axis + 1 :]) % 2**32)
        index = index + jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * stride
    return survives(index, rate, seed, site)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _drop(x, rate, whole, *where):
    seed, site, first = where
    keep = keep_mask(x.shape, rate, seed, site, whole, first)
    return jnp.where(keep, x / (1.0 - rate), 0.0).astype(x.dtype)


def _drop_fwd(x, rate, whole, *where):
    return _drop(x, rate, whole, *where), where


def _drop_bwd(rate, whole, where, g):
    return _drop(g, rate, whole, *where), None, None, None


_drop.defvjp(_drop_fwd, _drop_bwd)


def dropout(
    x: Array,
    rate: float,
    seed: Array | None,
    site: Array | int,
    whole: tuple[int, ...] | None = None,
    first: Array | int = 0,
) -> Array:
    """Drops x (Srivastava et al. 2014): 0 with probability `rate`, else x / (1 - rate).

    `seed` is a uint32 scalar, new at every step; None switches dropout off. `site` tells the
    calls of one model apart. `whole` and `first` are for a part of an array, as in `keep_mask`.

    The mask is a hash of the element's index: no random bits are stored or drawn.
    `jax.random.bernoulli` spends twenty rounds of threefry on every element and autodiff keeps the
    mask for the backward pass. Here element i of call site s survives when
    mix(mix(i ^ seed) + s) >= rate * 2^32. That fuses into the surrounding elementwise code, and the
    backward pass computes the mask again, so dropout costs no memory.
    """
    if seed is None or rate == 0.0:
        return x
    return _drop(x, rate, whole, seed, jnp.uint32(site), jnp.uint32(first))


class Mlp(nnx.Module):
    """Applies two linear layers with an activation between them.

    If it is gated (Shazeer 2020, arXiv:2002.05202), the activation is applied to a third layer,
    `gate`, and multiplied with `up`. Dropout is applied to the output, or to what `down` reads.
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
        drop_inside: bool = False,
    ):
        self.gate = Linear(width, inner, policy, bias) if gated else None
        self.up = Linear(width, inner, policy, bias)
        self.down = Linear(inner, width, policy, bias)
        self.activation = activation(activation_name)
        self.rate = rate
        self.drop_inside = drop_inside

    def __call__(self, x_BTD: Array, seed: Array | None, site: int) -> Array:
        if self.up.in_columns:
            x_BTD = axes.shared(x_BTD, (axes.MODEL,))
        y_BTF = self.up(x_BTD)
        if self.gate is None:
            y_BTF = self.activation(y_BTF)
        else:
            y_BTF = self.activation(self.gate(x_BTD)) * y_BTF
        if not self.drop_inside:
            return dropout(self.down(y_BTF), self.rate, seed, site)
        B, T, F = y_BTF.shape
        first = axes.index((axes.MODEL,)) * jnp.uint32(F) if self.up.in_columns else 0
        whole = B, T, self.up.d_out
        return self.down(dropout(y_BTF, self.rate, seed, site, whole, first))


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
