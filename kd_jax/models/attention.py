"""Computes multi-head self-attention of encoders and decoders, with a KV cache for generation."""

import jax
import jax.numpy as jnp
from flax import nnx, struct

from kd_jax import axes
from kd_jax.models import rotary
from kd_jax.models.layers import MASKED, Linear, dropout
from kd_jax.precision import Policy, einsum, exact
from kd_jax.types import Array, Heads


class Past(struct.PyTreeNode):
    """Holds one layer's keys and values, with room for S tokens."""

    k_BSGK: Array
    v_BSGK: Array
    start: Array  # int32 scalar: new ones are written from there

    def extended(self, k_BTGK: Array, v_BTGK: Array) -> tuple[Array, Array]:
        """Adds keys and values: returns all keys and all values, (B, S, G, K)."""
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(room, new.astype(room.dtype), self.start, axis=1)
            for room, new in ((self.k_BSGK, k_BTGK), (self.v_BSGK, v_BTGK))
        )


class Scope(struct.PyTreeNode):
    """Holds a decoder's attention mask, positions and cache, which tell what each token sees."""

    mask: Array  # as in `attention`
    # By width of the heads: cosine and sine (B or 1, T, R); none without rotary embeddings.
    angles: dict[int, tuple[Array, Array]] = struct.field(default_factory=dict)
    past: Past | None = None  # of this layer; the tokens come after those in it
    causal: bool = struct.field(pytree_node=False, default=False)  # as in `attention`


class Attention(nnx.Module):
    """Multi-head self-attention (Vaswani et al. 2017) with separate q, k, v and o projections.

    `rate` is the dropout of the attention weights, `out_rate` that of the output; `scale` is a
    factor of the scores; `head_width` is width / num_heads by default; with fewer `num_kv_heads`,
    several heads share keys and values (Ainslie et al. 2023, arXiv:2305.13245); `value_width` is
    the width of the input of `v`, if not `width`; `bias` is for q, k and v.
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
        bias: bool = True,
        out_bias: bool = True,
    ):
        head_width = head_width or width // num_heads
        inner, shared = num_heads * head_width, (num_kv_heads or num_heads) * head_width
        self.q = Linear(width, inner, policy, bias)
        self.k = Linear(width, shared, policy, bias)
        self.v = Linear(value_width or width, shared, policy, bias)
        self.o = Linear(inner, width, policy, out_bias)
        self.head_width = head_width
        self.scale = scale
        self.rate = rate
        self.out_rate = out_rate
        self.policy = policy

    def __call__(
        self,
        x_BTD: Array,
        scope: Scope | Array,
        seed: Array | None,
        site: int,
        values_BTD: Array | None = None,
    ) -> tuple[Array, Heads]:
        """Computes the output, and queries, keys and values (with a cache, all that it then holds).

        `scope` is only a mask if tokens have neither angles nor a cache; `v` reads `values_BTD`, by
        default `x_BTD`. Uses dropout sites `site` and `site + 1`.
        """
        scope = scope if isinstance(scope, Scope) else Scope(scope)
        B, T, _ = x_BTD.shape
        values_BTD = x_BTD if values_BTD is None else values_BTD
        if self.q.in_columns:  # of this device's heads
            x_BTD, values_BTD = (axes.shared(x, (axes.MODEL,)) for x in (x_BTD, values_BTD))
        q, k, v = (
            project(inputs).reshape(B, T, -1, self.head_width)
            for project, inputs in ((self.q, x_BTD), (self.k, x_BTD), (self.v, values_BTD))
        )
        if scope.angles:
            q, k = (rotary.rotate(x, scope.angles[self.head_width]) for x in (q, k))
        if scope.past is not None:
            k, v = scope.past.extended(k, v)
        of_heads = seed
        if self.q.in_columns and seed is not None:
            of_heads = seed + axes.index((axes.MODEL,)) * jnp.uint32(0xC2B2AE3D)
        y_BTHK = attention(
            q, k, v, scope.mask, self.scale, self.rate, of_heads, site, self.policy, scope.causal
        )
        y_BTD = dropout(self.o(y_BTHK.reshape(B, T, -1)), self.out_rate, seed, site + 1)
        return y_BTD, Heads(q * self.scale, k, v)


def attention(q_BTHK, k_BSGK, v_BSGK, mask, scale, rate, seed, site, policy, causal=False) -> Array:
    """Computes softmax(scale q k, masked) v, (B, T, H, K).

    G divides H: each group of H / G neighboring query heads shares a key and value head. `mask` is
    boolean, (B, 1, 1 or T, S), True where a query (third axis) may see a key; `causal` promises
    that no query sees later keys, so that blocks of queries skip these. The fused kernels of
    `policy.attention` have no dropout, so a step with dropout takes the explicit path.
    """
    B, T, H, K = q_BTHK.shape
    S, G = k_BSGK.shape[1:3]
    if policy.attention != "explicit" and (seed is None or rate == 0.0):
        # cuDNN takes no mask whose query axis is broadcast, and no single tokens with a past.
        mask = jnp.broadcast_to(mask, (*mask.shape[:2], T, S))
        kernel = policy.attention if T == S else "xla"
        with jax.default_matmul_precision("highest" if exact(policy.operand) else "default"):
            return jax.nn.dot_product_attention(
                q_BTHK, k_BSGK, v_BSGK, mask=mask, scale=scale, implementation=kernel
            )
    # One leading batch axis: XLA's CPU backend runs such products at full speed, others do not.
    # Queries that share a key follow each other, as if they were more tokens.
    q_BTGJK = (q_BTHK * scale).reshape(B, T, G, H // G, K)
    q_NJTK = q_BTGJK.transpose(0, 2, 3, 1, 4).reshape(B * G, H // G, T, K)
    k_NSK, v_NSK = (x.transpose(0, 2, 1, 3).reshape(B * G, S, K) for x in (k_BSGK, v_BSGK))
    # As a summand, once for all heads: XLA would compute a mask again for each of them.
    masked = jax.lax.optimization_barrier(jnp.where(mask, 0.0, MASKED))
    if seed is not None:
        scores_BHTS = _scores(q_NJTK, k_NSK, masked, policy)
        weights_BHTS = jax.nn.softmax(scores_BHTS, axis=-1).astype(policy.activation)
        weights_BHTS = dropout(weights_BHTS, rate, seed, site)
        y_NJTK = _mixed(weights_BHTS, v_NSK, policy)
    elif causal and T >= 2 * _BLOCK:
        y_NJTK = _in_blocks(q_NJTK, k_NSK, v_NSK, masked, policy)
    else:
        y_NJTK = _without_dropout(q_NJTK, k_NSK, v_NSK, masked, policy)
    return y_NJTK.reshape(B, H, T, K).transpose(0, 2, 1, 3)


_BLOCK, _MOST = 64, 8  # queries of a block at least, blocks of a row at most


def _in_blocks(q_NJTK, k_NSK, v_NSK, masked, policy) -> Array:
    """Computes attention for one block of queries after the other, each with the keys up to its
    end: (N, J, T, K)."""
    T, found = q_NJTK.shape[2], []
    size = max(_BLOCK, -(-T // _MOST))
    for start in range(0, T, size):
        end = min(start + size, T)
        block = (
            q_NJTK[:, :, start:end],
            k_NSK[:, :end],
            v_NSK[:, :end],
            masked[..., start:end, :end],
        )
        # Not all at once: the scores of one block stay near the processor.
        block, found = jax.lax.optimization_barrier((block, found))
        found = [*found, _without_dropout(*block, policy)]
    return jnp.concatenate(found, axis=2)


def _scores(q_NJTK, k_NSK, masked, policy) -> Array:
    """Computes masked scores, float32 (B, H, T, S)."""
    N, J, T, K = q_NJTK.shape
    scores = einsum("nqk,nsk->nqs", q_NJTK.reshape(N, J * T, K), k_NSK, policy)
    return scores.reshape(len(masked), -1, T, k_NSK.shape[1]).astype(jnp.float32) + masked


def _mixed(weights_BHTS, v_NSK, policy) -> Array:
    """Computes the weighted sum of the values, (N, J, T, K)."""
    N, S, K = v_NSK.shape
    T = weights_BHTS.shape[2]
    return einsum("nqs,nsk->nqk", weights_BHTS.reshape(N, -1, S), v_NSK, policy).reshape(
        N, -1, T, K
    )


def _without_dropout(q_NJTK, k_NSK, v_NSK, masked, policy) -> Array:
    """Computes attention without dropout, (N, J, T, K); the softmax's division comes last, when
    there are fewer numbers to divide."""
    scores_BHTS = _scores(q_NJTK, k_NSK, masked, policy)
    largest = jax.lax.stop_gradient(scores_BHTS.max(axis=-1, keepdims=True))
    weights_BHTS = jnp.exp(scores_BHTS - largest)
    sums_NJT1 = weights_BHTS.sum(axis=-1).reshape(*q_NJTK.shape[:3], 1)
    y_NJTK = _mixed(weights_BHTS.astype(policy.activation), v_NSK, policy)
    return (y_NJTK / sums_NJT1).astype(policy.activation)
