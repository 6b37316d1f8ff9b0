"""Layers that encoders and decoders share. They hold parameters and static numbers, no randomness.

Parameters are born as zeros of the right shape (`family.build` draws the values), so a module can
be built abstractly. Linear kernels are (in, out); embeddings are (rows, D).
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from kd_jax.errors import UserError
from kd_jax.models.dropout import dropout
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
    """The elementwise function that HF calls `name`. Raises UserError listing what exists."""
    if name not in ACTIVATIONS:
        raise UserError(f"unknown activation {name!r}; have: {', '.join(sorted(ACTIVATIONS))}")
    return ACTIVATIONS[name]


class Linear(nnx.Module):
    """(B, T, in) -> (B, T, out)."""

    def __init__(self, d_in: int, d_out: int, policy: Policy):
        self.kernel = nnx.Param(jnp.zeros((d_in, d_out)))
        self.bias = nnx.Param(jnp.zeros((d_out,)))
        self.policy = policy

    def __call__(self, x_BTD: Array) -> Array:
        y_BTF = einsum("btd,df->btf", x_BTD, self.kernel[...], self.policy)
        return y_BTF + self.bias[...].astype(y_BTF.dtype)[None, None]


class LayerNorm(nnx.Module):
    """Layer normalisation over the last axis (Ba et al. 2016), statistics in float32.

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


class Embedding(nnx.Module):
    """A table of rows, looked up by ids."""

    def __init__(self, rows: int, width: int, policy: Policy):
        self.embedding = nnx.Param(jnp.zeros((rows, width)))
        self.policy = policy

    def __call__(self, ids: Array) -> Array:
        return self.embedding[...][ids].astype(self.policy.activation)


class Mlp(nnx.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, width: int, inner: int, activation_name: str, rate: float, policy: Policy):
        self.up = Linear(width, inner, policy)
        self.down = Linear(inner, width, policy)
        self.activation = activation(activation_name)
        self.rate = rate

    def __call__(self, x_BTD: Array, seed: Array | None, site: int) -> Array:
        y_BTD = self.down(self.activation(self.up(x_BTD)))
        return dropout(y_BTD, self.rate, seed, site)


class Attention(nnx.Module):
    """Multi-head self-attention (Vaswani et al. 2017) with separate q, k, v and o projections.

    `rate` is the dropout of the attention weights, `out_rate` that of the output; `scale` is a
    factor of the scores; `head_width` is width / num_heads unless given; several heads share keys
    and values where there are fewer `num_kv_heads` (Ainslie et al. 2023, arXiv:2305.13245);
    `value_width` is that of what `v` reads, where it is not `width`.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        scale: float,
        rate: float,
        out_rate: float,
        policy: Policy,
        value_width: int | None = None,
        num_kv_heads: int | None = None,
        head_width: int | None = None,
    ):
        head_width = head_width or width // num_heads
        num_kv_heads = num_kv_heads or num_heads
        self.q = Linear(width, num_heads * head_width, policy)
        self.k = Linear(width, num_kv_heads * head_width, policy)
        self.v = Linear(value_width or width, num_kv_heads * head_width, policy)
        self.o = Linear(num_heads * head_width, width, policy)
        self.head_width = head_width
        self.groups = num_heads // num_kv_heads
        self.scale = scale
        self.rate = rate
        self.out_rate = out_rate
        self.policy = policy

    def __call__(
        self,
        x_BTD: Array,
        mask: Array,
        seed: Array | None,
        site: int,
        values_BTD: Array | None = None,
    ) -> tuple[Array, Heads]:
        """The output and what was compared. `mask` is as in `attention`; `v` reads `values_BTD`,
        `x_BTD` where there are none. Uses dropout sites `site` and `site + 1`."""
        B, T, _ = x_BTD.shape
        values_BTD = x_BTD if values_BTD is None else values_BTD
        q, k, v = (
            project(inputs).reshape(B, T, -1, self.head_width)
            for project, inputs in ((self.q, x_BTD), (self.k, x_BTD), (self.v, values_BTD))
        )
        k, v = (jnp.repeat(x, self.groups, axis=2) if self.groups > 1 else x for x in (k, v))
        y_BTHK = attention(q, k, v, mask, self.scale, self.rate, seed, site, self.policy)
        y_BTD = dropout(self.o(y_BTHK.reshape(B, T, -1)), self.out_rate, seed, site + 1)
        return y_BTD, Heads(q * self.scale, k, v)


def attention(q_BTHK, k_BTHK, v_BTHK, mask, scale, rate, seed, site, policy) -> Array:
    """softmax(scale q k, masked) v, (B, T, H, K).

    `mask` is boolean, (B, 1, 1 or T, T), True where a query (third axis) may look at a key. The
    fused kernels of `policy.attention` know no dropout, so a step with it takes the explicit path.
    """
    if policy.attention != "explicit" and (seed is None or rate == 0.0):
        # cuDNN takes no mask whose query axis is broadcast.
        length = (q_BTHK.shape[1], k_BTHK.shape[1])
        mask = jnp.broadcast_to(mask, (*mask.shape[:2], *length))
        return jax.nn.dot_product_attention(
            q_BTHK, k_BTHK, v_BTHK, mask=mask, scale=scale, implementation=policy.attention
        )
    B, T, H, K = q_BTHK.shape
    # One leading batch axis: XLA's CPU backend runs such products at full speed, others do not.
    q_NTK, k_NSK, v_NSK = (
        x.transpose(0, 2, 1, 3).reshape(B * H, T, K) for x in (q_BTHK * scale, k_BTHK, v_BTHK)
    )
    scores_BHTS = einsum("ntk,nsk->nts", q_NTK, k_NSK, policy).reshape(B, H, T, T)
    scores_BHTS = jnp.where(mask, scores_BHTS.astype(jnp.float32), MASKED)
    weights_BHTS = jax.nn.softmax(scores_BHTS, axis=-1).astype(policy.activation)
    weights_BHTS = dropout(weights_BHTS, rate, seed, site)
    y_NTK = einsum("nts,nsk->ntk", weights_BHTS.reshape(B * H, T, T), v_NSK, policy)
    return y_NTK.reshape(B, H, T, K).transpose(0, 2, 1, 3)


def run_blocks(blocks, x_BTD, mask, seed, sites: int, remat: bool) -> Layers:
    """Blocks one after the other: (x_BTD and each block's output, each block's attention heads).

    A block takes `sites` dropout sites, the first one's begin at 1. With `remat` each is computed
    again in the backward pass.
    """
    hidden, attention = [x_BTD], []
    for i, block in enumerate(blocks):
        run = jax.checkpoint(block, static_argnums=3) if remat else block
        x_BTD, heads = run(x_BTD, mask, seed, 1 + sites * i)
        hidden.append(x_BTD)
        attention.append(heads)
    return tuple(hidden), tuple(attention)


def key_mask(mask_BT: Array) -> Array:
    """Every query sees the tokens and not the padding: (B, 1, 1, T)."""
    return (mask_BT > 0)[:, None, None, :]


def causal_mask(mask_BT: Array) -> Array:
    """Query t sees the tokens at or before t: (B, 1, T, T)."""
    length = mask_BT.shape[1]
    lower_TT = jnp.tril(jnp.ones((length, length), bool))
    return key_mask(mask_BT) & lower_TT[None, None]


def check_length(length: int, max_tokens: int) -> None:
    """Refuses rows longer than the position table, which a lookup would silently clamp."""
    if length > max_tokens:
        raise UserError(
            f"rows of {length} tokens, but the model has positions for {max_tokens}: "
            f"set seq_len to at most {max_tokens}"
        )


def gather(x_BTD: Array, positions_BP: Array | None) -> Array:
    """Rows' tokens at the given positions, (B, P, D); all of them where positions is None."""
    if positions_BP is None:
        return x_BTD
    return jnp.take_along_axis(x_BTD, positions_BP[:, :, None], axis=1)
