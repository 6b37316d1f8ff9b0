"""Computes multi-head self-attention of encoders and decoders."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx, struct

from kd_jax import axes
from kd_jax.models import flash, rotary
from kd_jax.models.cache import Past
from kd_jax.models.layers import MASKED, Linear, dropout
from kd_jax.precision import Policy, einsum
from kd_jax.types import Array, Heads


class Scope(struct.PyTreeNode):
    """Describes which keys each query may attend to, with the tokens' positions.

    A query sees keys that are tokens; if `causal`, only those at or before it; with segments, those
    of segment 0 and of its own; with the window of a layer, those of so many positions: up to its
    own if `causal`, else as many on both sides of it. With a bias, scores depend on the distance.
    """

    real_BS: Array | None  # bool, False where a key is padding, which comes last
    segments_BS: Array | None = None  # int32
    places_BS: Array | None = None  # int32: positions, if they are not the index in the row
    # By number of the rotary embedding and width of the heads: cosine and sine (B or 1, T, R).
    angles: dict[tuple[int, int], tuple[Array, Array]] = struct.field(default_factory=dict)
    past: Past | None = None  # of this layer, before one more token: it alone tells what that sees
    # Float32, what is added to scores, by head and by the key's index minus the query's, mod 2 T.
    bias_H2T: Array | None = None
    causal: bool = struct.field(pytree_node=False, default=False)

    def sides(self, window: int | None, keys: int) -> tuple[int, int]:
        """Counts the positions before a query, and after it, that a window has; `keys` for all."""
        if window is None:
            return keys, 0 if self.causal else keys
        return (window - 1, 0) if self.causal else (window // 2, window // 2)

    def mask(
        self, first: Array | int, queries: int, keys: int, window: int | None, begin: int = 0
    ) -> Array:
        """Tells which keys from number `begin` to before `keys` each of `queries` queries sees,
        counted from number `first`: bool, (B, 1, 1 or queries, keys - begin)."""
        query, key = (first + jnp.arange(queries))[None], jnp.arange(begin, keys)[None]
        those = slice(begin, keys)
        seen = self.real_BS[:, None, None, those]
        if self.causal:
            seen = seen & (_of_keys(key) <= _of_queries(query))
        if self.segments_BS is not None:
            own, other = self._numbers(self.segments_BS, query, those)
            seen = seen & ((other == 0) | (other == own))
        if window is not None:
            own, other = _of_queries(query), _of_keys(key)
            if self.places_BS is not None:
                own, other = self._numbers(self.places_BS, query, those)
            before, after = self.sides(window, keys)
            seen = seen & (other >= own - before)
            seen = seen & (other <= own + after) if after else seen
        return seen

    def bias(self, first: Array | int, queries: int, keys: int, begin: int) -> Array:
        """Makes biases for queries and keys numbered as in `mask`, (1, H, queries, keys - begin).

        A row is the row before it, one place further: rows of 2 T numbers, read as ones of 2 T - 1.
        """
        H, size = self.bias_H2T.shape
        row_H2T = jnp.roll(self.bias_H2T, first - begin, axis=1)
        rows = jnp.tile(row_H2T, (1, queries))[:, : queries * (size - 1)]
        return rows.reshape(1, H, queries, size - 1)[..., : keys - begin]

    def _numbers(self, x_BS: Array, query: Array, keys: slice) -> tuple[Array, Array]:
        """Selects what belongs to queries, (B, 1, T, 1), and to keys, (B, 1, 1, S)."""
        return _of_queries(jnp.take(x_BS, query[0], axis=1, mode="clip")), _of_keys(x_BS[:, keys])


def _of_queries(x_BT: Array) -> Array:
    return x_BT[:, None, :, None]


def _of_keys(x_BS: Array) -> Array:
    return x_BS[:, None, None, :]


class Attention(nnx.Module):
    """Multi-head self-attention (Vaswani et al. 2017) with separate q, k, v and o projections.

    `rate` is the dropout of the attention weights, `out_rate` that of the output; `scale` is a
    factor of the scores; `head_width` is width / num_heads by default; with fewer `num_kv_heads`,
    several heads share keys and values (Ainslie et al. 2023, arXiv:2305.13245); `value_width` is
    the width of the input of `v`, if not `width`; `bias` is for q, k and v; with a `window`,
    queries see so many tokens, their own included (Beltagy et al. 2020, arXiv:2004.05150); `norms`
    are applied to queries and keys: to each head, or to all at once if they are as wide as these;
    `rotary` is the number of the rotary embedding, None for none.
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
        window: int | None = None,
        norms: tuple[nnx.Module | None, nnx.Module | None] = (None, None),
        rotary: int | None = None,
    ):
        head_width = head_width or width // num_heads
        inner, shared = num_heads * head_width, (num_kv_heads or num_heads) * head_width
        self.q = Linear(width, inner, policy, bias)
        self.k = Linear(width, shared, policy, bias)
        self.v = Linear(value_width or width, shared, policy, bias)
        self.o = Linear(inner, width, policy, out_bias)
        self.q_norm, self.k_norm = norms
        self.head_width = head_width
        self.scale = scale
        self.rate = rate
        self.out_rate = out_rate
        self.policy = policy
        self.window = window
        self.rotary = rotary

    def __call__(
        self,
        x_BTD: Array,
        scope: Scope,
        seed: Array | None,
        site: int,
        values_BTD: Array | None = None,
    ) -> tuple[Array, Heads | Past]:
        """Computes the output, and queries, keys and values; with a past, that with the new token.

        `v` reads `values_BTD`, by default `x_BTD`. Uses dropout sites `site` and `site + 1`.
        """
        B, T, _ = x_BTD.shape
        values_BTD = x_BTD if values_BTD is None else values_BTD
        if self.q.in_columns:  # of this device's heads
            x_BTD, values_BTD = (axes.shared(x, (axes.MODEL,)) for x in (x_BTD, values_BTD))
        q = self._heads(self.q(x_BTD), self.q_norm)
        k = self._heads(self.k(x_BTD), self.k_norm)
        v = self._heads(self.v(values_BTD))
        if self.rotary is not None:
            q, k = (rotary.rotate(x, scope.angles[self.rotary, self.head_width]) for x in (q, k))
        if scope.past is not None:
            past = scope.past.extended(k, v)
            y_B1HK = past.attend(q * self.scale, self.window, self.policy)
            return self.o(y_B1HK.reshape(B, T, -1)), past
        of_heads = seed
        if self.q.in_columns and scope.bias_H2T is not None:
            own_H2T = axes.own(axes.shared(scope.bias_H2T, (axes.MODEL,)), (axes.MODEL,))
            scope = scope.replace(bias_H2T=own_H2T)
        if self.q.in_columns and seed is not None:
            of_heads = seed + axes.index((axes.MODEL,)) * jnp.uint32(0xC2B2AE3D)
        y_BTHK = attention(
            q, k, v, scope, self.scale, self.rate, of_heads, site, self.policy, self.window
        )
        y_BTD = dropout(self.o(y_BTHK.reshape(B, T, -1)), self.out_rate, seed, site + 1)
        return y_BTD, Heads(q * self.scale, k, v)

    def _heads(self, x_BTF: Array, norm: nnx.Module | None = None) -> Array:
        """Splits features into heads, (B, T, H, K), and normalizes them."""
        heads = *x_BTF.shape[:2], -1, self.head_width
        if norm is None:
            return x_BTF.reshape(heads)
        if norm.width == self.head_width:
            return norm(x_BTF.reshape(heads), self.q.in_columns)
        return norm(x_BTF, self.q.in_columns).reshape(heads)


def attention(q_BTHK, k_BSGK, v_BSGK, scope, scale, rate, seed, site, policy, window=None) -> Array:
    """Computes softmax(scale q k, masked) v, (B, T, H, K), where `scope` tells what queries see.

    G divides H: each group of H / G neighboring query heads shares a key and value head.
    `window` counts the tokens that a query sees, its own included.
    `policy.attention` names the way; what its kernel cannot do is computed in blocks of queries.
    All of them give the same figures, with the same dropout. Of padding, what comes out differs.
    """
    T, K = q_BTHK.shape[1::2]
    seed = seed if rate > 0.0 or policy.attention == "explicit" else None
    S = k_BSGK.shape[1]
    window = None if scope.sides(window, S)[0] >= S - 1 else window
    # Kernels know neither biases nor distances of positions that are no index.
    plain = scope.bias_H2T is None and (window is None or scope.places_BS is None)
    given = q_BTHK, k_BSGK, v_BSGK, scope
    if policy.attention == "pallas" and plain and T >= SHORT:
        return _on_tpu(*given, scale, rate, seed, site, policy, window)
    # cuDNN's dropout has a seed that is part of the program, so each step would drop the same.
    if policy.attention == "cudnn" and plain and seed is None and K % 8 == 0 and K <= 128:
        return _by_cudnn(*given, scale, window)
    return _explicit(*given, scale, rate, seed, site, policy, window)


# On a TPU, kernels read and write less from here on (docs/scaling.md): at 128 tokens, all scores
# at once are as good.
SHORT = 256


def _on_tpu(q_BTHK, k_BTGK, v_BTGK, scope, scale, rate, seed, site, policy, window) -> Array:
    kernels = flash.Kernels(
        q_BTHK.shape[1],
        *scope.sides(window, q_BTHK.shape[1]),
        rate=0.0 if seed is None else rate,
        operand=policy.operand,
    )
    ids = None
    if scope.segments_BS is not None or not scope.causal:  # causal queries see no padding
        own_BT = scope.segments_BS
        own_BT = jnp.zeros(scope.real_BS.shape, jnp.int32) if own_BT is None else own_BT
        ids = own_BT, jnp.where(scope.real_BS, own_BT, flash.PADDING)
    return flash.attend(q_BTHK * scale, k_BTGK, v_BTGK, ids, (seed, site), kernels)


def _by_cudnn(q_BTHK, k_BTGK, v_BTGK, scope, scale, window) -> Array:
    T = q_BTHK.shape[1]
    told = {"is_causal": scope.causal}
    if window is not None and scope.causal:
        told["local_window_size"] = scope.sides(window, T)
    if scope.segments_BS is not None:
        told["mask"] = scope.mask(0, T, T, None)
    elif not scope.causal:  # causal queries see no padding
        told["key_value_seq_lengths"] = jnp.maximum(scope.real_BS.sum(axis=1), 1).astype(jnp.int32)
        if window is not None:  # cuDNN knows windows of causal queries alone
            told["mask"] = Scope(jnp.ones((1, T), bool)).mask(0, T, T, window)
    return jax.nn.dot_product_attention(
        q_BTHK, k_BTGK, v_BTGK, scale=scale, implementation="cudnn", **told
    )


_SCORES = 2**26  # at most, of a block of queries; a CPU computes up to four times as many at once
_LEAST, _MOST = 64, 8  # queries of a block that skips keys, blocks of a row


def _explicit(q_BTHK, k_BSGK, v_BSGK, scope, scale, rate, seed, site, policy, window) -> Array:
    """Computes attention with its scores in memory: of all queries, or of a block of them at a
    time, which the backward pass computes again."""
    B, T, H, K = q_BTHK.shape
    S, G = k_BSGK.shape[1:3]
    # One leading batch axis: XLA's CPU backend runs such products at full speed, others do not.
    # Queries that share a key follow each other, as if they were more tokens.
    q_BTGJK = (q_BTHK * scale).reshape(B, T, G, H // G, K)
    q_NJTK = q_BTGJK.transpose(0, 2, 3, 1, 4).reshape(B * G, H // G, T, K)
    k_NSK, v_NSK = (x.transpose(0, 2, 1, 3).reshape(B * G, S, K) for x in (k_BSGK, v_BSGK))

    def some(begin, q_NJTK, k_NSK, v_NSK, first):
        """Attends from the queries that begin with number `first` to the keys from `begin` on."""
        queries, end = q_NJTK.shape[2], begin + k_NSK.shape[1]
        mask = scope.mask(first, queries, end, window, begin)
        # As a summand, once for all heads: XLA would compute a mask again for each of them.
        masked = [jax.lax.optimization_barrier(jnp.where(mask, 0.0, MASKED))]
        if scope.bias_H2T is not None:
            masked.append(scope.bias(first, queries, end, begin))
        if seed is None:
            return _without_dropout(q_NJTK, k_NSK, v_NSK, masked, policy)
        weights_BHTS = jax.nn.softmax(_scores(q_NJTK, k_NSK, masked, policy), axis=-1)
        weights_BHTS = weights_BHTS.astype(policy.activation)
        weights_BHTS = dropout(weights_BHTS, rate, seed, site, (B, H, T, S), first * S + begin)
        return _mixed(weights_BHTS, v_NSK, policy)

    fits = max(_SCORES // (B * H * S), 1)  # queries
    small = T <= (4 * fits if policy.on_cpu else min(fits, 256))
    # Blocks skip keys that none of their queries sees on a CPU; elsewhere one loop over all of them
    # compiles much faster.
    before, after = scope.sides(window if scope.places_BS is None else None, S)
    skip = policy.on_cpu and T >= 2 * _LEAST and after + _LEAST < T
    skip = skip and (seed is None or not small)
    size = max(_LEAST, -(-T // _MOST)) if skip else T
    found = []
    for start in range(0, T, size):
        end = min(start + size, T)
        begin, stop = (max(start - before, 0), min(end + after, S)) if skip else (0, S)
        block = q_NJTK[:, :, start:end], k_NSK[:, begin:stop], v_NSK[:, begin:stop]
        if skip:  # not all at once: the scores of one block stay near the processor
            block, found = jax.lax.optimization_barrier((block, found))
        run = functools.partial(some, begin)
        run = run if small else functools.partial(_in_turn, run, min(fits, 256))
        found = [*found, run(*block, start)]
    y_NJTK = found[0] if len(found) == 1 else jnp.concatenate(found, axis=2)
    return y_NJTK.reshape(B, H, T, K).transpose(0, 2, 1, 3)


def _in_turn(some, most, q_NJTK, k_NSK, v_NSK, first) -> Array:
    """Runs `some` on blocks of at most `most` queries, one after the other."""
    N, J, T, K = q_NJTK.shape
    count = -(-T // most)
    size = -(-T // count)
    q_NJTK = jnp.pad(q_NJTK, ((0, 0), (0, 0), (0, count * size - T), (0, 0)))
    blocks = jnp.moveaxis(q_NJTK.reshape(N, J, count, size, K), 2, 0)

    @jax.checkpoint
    def run(block, start):
        return some(block, k_NSK, v_NSK, start)

    y = jax.lax.map(lambda pair: run(*pair), (blocks, first + size * jnp.arange(count)))
    return jnp.moveaxis(y, 0, 2).reshape(N, J, count * size, K)[:, :, :T]


def _scores(q_NJTK, k_NSK, masked, policy) -> Array:
    """Computes masked scores, float32 (B, H, T, S): products with `masked` added, summands."""
    N, J, T, K = q_NJTK.shape
    scores = einsum("nqk,nsk->nqs", q_NJTK.reshape(N, J * T, K), k_NSK, policy)
    scores = scores.reshape(len(masked[0]), -1, T, k_NSK.shape[1]).astype(jnp.float32)
    return sum(masked, start=scores)


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
