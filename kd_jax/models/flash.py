"""Computes attention on a TPU without holding its scores in memory: Pallas kernels, forward and
backward (FlashAttention-2, Dao 2023, arXiv:2307.08691).

A block of scores lives in the processor's own memory, keys down and queries across, so that what
belongs to a query (its largest score, their sum) is one row. Blocks that nobody sees are skipped.
The kernels of `jax.experimental.pallas.ops.tpu` know neither dropout nor segments that share a
beginning.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kd_jax.models.layers import MASKED, survives
from kd_jax.precision import exact
from kd_jax.types import Array

PADDING = -1  # the id of keys that nobody sees; keys with id 0 are seen by all
_LANES, _LARGEST = 128, 512  # block sizes: all multiples of the first, up to the second


@dataclasses.dataclass(frozen=True)
class Kernels:
    """Kernels for rows of `length` tokens, with what is known of them before they run."""

    length: int
    before: int  # keys before its own that a query sees, and after it; `length`: all
    after: int
    rate: float  # of dropout
    operand: str  # what products multiply
    interpret: bool = False  # on any platform, for tests

    @property
    def padded(self) -> int:
        """Returns the length that rows are padded to, a multiple of `block`."""
        return -(-self.length // _LANES) * _LANES

    @property
    def block(self) -> int:
        """Returns the number of queries, and of keys, in a block of scores."""
        sizes = range(_LANES, _LARGEST + 1, _LANES)
        return max(size for size in sizes if self.padded % size == 0)

    @property
    def blocks(self) -> int:
        return self.padded // self.block

    @property
    def reach(self) -> tuple[int, int]:
        """Returns how many blocks back, and ahead, a block of queries sees, besides its own."""
        back, ahead = (min(-(-n // self.block), self.blocks - 1) for n in (self.before, self.after))
        return back, ahead

    @property
    def steps(self) -> int:
        """Returns the number of steps in which a block meets all blocks that it may see."""
        return min(sum(self.reach) + 1, self.blocks)

    @property
    def pairs(self) -> int:
        """Counts the pairs of a query and a key whose scores are computed, per head of a row."""
        back, ahead = self.reach
        seen = (min(i, back) + 1 + min(self.blocks - 1 - i, ahead) for i in range(self.blocks))
        return sum(seen) * self.block**2

    def keys(self, i, step):
        """Finds which block of keys queries of block `i` see in this step, and whether any."""
        return self._met(i, step, *self.reach)

    def queries(self, j, step):
        """Finds which block of queries sees keys of block `j` in this step, and whether any."""
        return self._met(j, step, *self.reach[::-1])

    def _met(self, i, step, back, ahead):
        j = jnp.maximum(i - back, 0) + step
        last = jnp.minimum(i + ahead, self.blocks - 1)
        return jnp.minimum(j, last), j <= last

    def product(self, a, b, axes: tuple[int, int]):
        """Multiplies two matrices, contracting these axes, in float32."""
        a, b = (x.astype(jnp.dtype(self.operand)) for x in (a, b))
        dims = (((axes[0],), (axes[1],)), ((), ()))
        return jax.lax.dot_general(
            a, b, dims, precision=exact(self.operand), preferred_element_type=jnp.float32
        )

    def indices(self, i, j):
        """Numbers the queries and keys of a block of scores."""
        shape = self.block, self.block
        query = i * self.block + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
        key = j * self.block + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
        return query, key

    def scores(self, q_ref, k_ref, ids, i, j):
        """Computes a block of masked scores, (keys, queries)."""
        scores = self.product(k_ref[...], q_ref[...], (1, 1))
        seen = None
        if ids is not None:
            query_id, key_id = ids[0][...], ids[1][...]
            seen = (key_id == 0) | (key_id == query_id)
        query, key = self.indices(i, j)
        for side, near in (
            (self.after, key <= query + self.after),
            (self.before, key >= query - self.before),
        ):
            if side < self.length:
                seen = near if seen is None else seen & near
        return scores if seen is None else jnp.where(seen, scores, MASKED)

    def dropped(self, x, drawn_ref, head, i, j):
        """Applies dropout to a block of weights, or of their gradients; `head` counts over rows."""
        if self.rate == 0.0:
            return x
        query, key = self.indices(i, j)
        index = head * (self.length * self.length) + query * self.length + key
        keep = survives(index.astype(jnp.uint32), self.rate, drawn_ref[0], drawn_ref[1])
        return jnp.where(keep, x / (1.0 - self.rate), 0.0)

    def cost(self, products: int, heads: int, *arrays) -> pl.CostEstimate:
        """States what a kernel costs, for XLA's schedule and `plans.compiled`."""
        width = arrays[0].shape[-1]
        return pl.CostEstimate(
            flops=2 * products * heads * self.pairs * width,
            transcendentals=heads * self.pairs,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in arrays),
        )


def attend(
    q_BTHK: Array,
    k_BTGK: Array,
    v_BTGK: Array,
    ids: tuple[Array, Array] | None,
    drawn: tuple[Array, Array] | None,
    kernels: Kernels,
) -> Array:
    """Computes softmax(q k, masked) v of scaled queries, (B, T, H, K); G divides H.

    `ids` of queries and keys, int32 (B, T): a query sees keys with id 0 or its own. Rows without
    any must not matter. Without ids all keys count, as far as `kernels` see. Dropout is that of
    `layers.dropout` on weights (B, H, T, T), with `drawn` its seed and site.
    """
    more = kernels.padded - kernels.length
    q, k, v = (
        jnp.pad(x.transpose(0, 2, 1, 3), ((0, 0), (0, 0), (0, more), (0, 0)))
        for x in (q_BTHK, k_BTGK, v_BTGK)
    )
    if ids is None and more and kernels.after:
        ids = (jnp.zeros(q_BTHK.shape[:2], jnp.int32),) * 2
    if ids is not None:
        query_BT, key_BT = (jnp.pad(x, ((0, 0), (0, more)), constant_values=PADDING) for x in ids)
        ids = query_BT[:, None, :], key_BT[:, :, None]
    drawn = None if kernels.rate == 0.0 else jnp.stack([jnp.uint32(x) for x in drawn])
    y_BHTK = _attend(q, k, v, (drawn, ids), kernels)
    return y_BHTK[:, :, : kernels.length].transpose(0, 2, 1, 3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q, k, v, more, kernels):
    return _forward(q, k, v, more, kernels)[0]


def _attend_fwd(q, k, v, more, kernels):
    y, logs = _forward(q, k, v, more, kernels)
    return y, (q, k, v, more, y, logs)


def _attend_bwd(kernels, residuals, dy):
    q, k, v, more, y, logs = residuals
    means = (y.astype(jnp.float32) * dy.astype(jnp.float32)).sum(-1)[:, :, None]
    given = q, k, v, dy, logs, means, more
    return (_backward_queries(*given, kernels), *_backward_keys(*given, kernels), None)


_attend.defvjp(_attend_fwd, _attend_bwd)


def _call(body, kernels, grid, reduced, where, inputs, outputs, scratch, cost):
    """Runs a kernel's `body` over a grid whose last `reduced` axes add up to one result.

    `where` maps a point of the grid to (row, head, head of keys, block of queries, of keys);
    inputs and outputs are pairs of a kind (_place) and an array, or the shape of one.
    """
    size = kernels.block

    def spec(kind, array):
        if array is None:
            return None
        if kind == "drawn":
            return pl.BlockSpec(memory_space=pltpu.SMEM)
        shape, index = {
            "q": ((None, None, size, array.shape[-1]), lambda b, h, g, i, j: (b, h, i, 0)),
            "k": ((None, None, size, array.shape[-1]), lambda b, h, g, i, j: (b, g, j, 0)),
            "row": ((None, None, 1, size), lambda b, h, g, i, j: (b, h, 0, i)),
            "query_id": ((None, 1, size), lambda b, h, g, i, j: (b, 0, i)),
            "key_id": ((None, size, 1), lambda b, h, g, i, j: (b, j, 0)),
        }[kind]
        return pl.BlockSpec(shape, lambda *point: index(*where(*point)))

    return pl.pallas_call(
        functools.partial(body, kernels),
        grid=grid,
        in_specs=[spec(*pair) for pair in inputs],
        out_specs=[spec(*pair) for pair in outputs],
        out_shape=[shape for _, shape in outputs],
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) * (len(grid) - reduced) + ("arbitrary",) * reduced
        ),
        cost_estimate=cost,
        interpret=kernels.interpret,
        name=body.__name__.strip("_"),
    )(*(array for _, array in inputs))


def _like(array, dtype=None, shape=None):
    return jax.ShapeDtypeStruct(shape or array.shape, dtype or array.dtype)


def _extras(more):
    drawn, ids = more
    query_id, key_id = (None, None) if ids is None else ids
    return ("drawn", drawn), ("query_id", query_id), ("key_id", key_id)


def _pair(query_id, key_id):
    return None if query_id is None else (query_id, key_id)


def _forward(q, k, v, more, kernels):
    """Computes the output, and logarithms of the sums of exponentials, (B, H, 1, T)."""
    B, H, T, K = q.shape
    steps, shared = kernels.steps, H // k.shape[1]
    return _call(
        _attention_forward,
        kernels,
        (B, H, kernels.blocks, steps),
        1,
        lambda b, h, i, step: (b, h, jax.lax.div(h, shared), i, kernels.keys(i, step)[0]),
        [("q", q), ("k", k), ("k", v), *_extras(more)],
        [("q", _like(q)), ("row", _like(q, jnp.float32, (B, H, 1, T)))],
        [(1, kernels.block), (1, kernels.block), (K, kernels.block)],
        kernels.cost(2, B * H, q, k, v, q),
    )


def _attention_forward(kernels, q, k, v, drawn, query_id, key_id, y, logs, largest, sums, mixed):
    b, h, i, step = (pl.program_id(axis) for axis in range(4))
    head, steps = b * pl.num_programs(1) + h, pl.num_programs(3)
    j, any_seen = kernels.keys(i, step)

    @pl.when(step == 0)
    def _():
        largest[...] = jnp.full(largest.shape, 2 * MASKED, jnp.float32)
        sums[...] = jnp.zeros(sums.shape, jnp.float32)
        mixed[...] = jnp.zeros(mixed.shape, jnp.float32)

    @pl.when(any_seen)
    def _():
        scores = kernels.scores(q, k, _pair(query_id, key_id), i, j)
        before = largest[...]
        now = jnp.maximum(before, scores.max(axis=0, keepdims=True))
        weights, shrink = jnp.exp(scores - now), jnp.exp(before - now)
        largest[...] = now
        sums[...] = sums[...] * shrink + weights.sum(axis=0, keepdims=True)
        weights = kernels.dropped(weights, drawn, head, i, j)
        mixed[...] = mixed[...] * shrink + kernels.product(v[...], weights, (0, 0))

    @pl.when(step == steps - 1)
    def _():
        y[...] = (mixed[...] / sums[...]).T.astype(y.dtype)
        logs[...] = largest[...] + jnp.log(sums[...])


def _weights(kernels, q, k, v, dy, logs, means, drawn, ids, head, i, j):
    """Computes a block of weights with dropout, and the gradient of its scores."""
    weights = jnp.exp(kernels.scores(q, k, ids, i, j) - logs[...])
    d_weights = kernels.product(v[...], dy[...], (1, 1))
    d_weights = kernels.dropped(d_weights, drawn, head, i, j)
    return kernels.dropped(weights, drawn, head, i, j), weights * (d_weights - means[...])


def _backward_queries(q, k, v, dy, logs, means, more, kernels):
    """Computes the queries' gradient."""
    B, H, _, K = q.shape
    steps, shared = kernels.steps, H // k.shape[1]
    (dq,) = _call(
        _attention_backward_queries,
        kernels,
        (B, H, kernels.blocks, steps),
        1,
        lambda b, h, i, step: (b, h, jax.lax.div(h, shared), i, kernels.keys(i, step)[0]),
        [("q", q), ("k", k), ("k", v), ("q", dy), ("row", logs), ("row", means), *_extras(more)],
        [("q", _like(q))],
        [(K, kernels.block)],
        kernels.cost(3, B * H, q, k, v, dy, q),
    )
    return dq


def _attention_backward_queries(
    kernels, q, k, v, dy, logs, means, drawn, query_id, key_id, dq, total
):
    b, h, i, step = (pl.program_id(axis) for axis in range(4))
    head, steps = b * pl.num_programs(1) + h, pl.num_programs(3)
    j, any_seen = kernels.keys(i, step)

    @pl.when(step == 0)
    def _():
        total[...] = jnp.zeros(total.shape, jnp.float32)

    @pl.when(any_seen)
    def _():
        ids = _pair(query_id, key_id)
        _, d_scores = _weights(kernels, q, k, v, dy, logs, means, drawn, ids, head, i, j)
        total[...] += kernels.product(k[...], d_scores, (0, 0))

    @pl.when(step == steps - 1)
    def _():
        dq[...] = total[...].T.astype(dq.dtype)


def _backward_keys(q, k, v, dy, logs, means, more, kernels):
    """Computes the gradients of keys and values, summed over the heads that share them."""
    (B, H, _, K), G = q.shape, k.shape[1]
    steps, shared = kernels.steps, H // G
    return _call(
        _attention_backward_keys,
        kernels,
        (B, G, kernels.blocks, shared, steps),
        2,
        lambda b, g, j, n, step: (b, g * shared + n, g, kernels.queries(j, step)[0], j),
        [("q", q), ("k", k), ("k", v), ("q", dy), ("row", logs), ("row", means), *_extras(more)],
        [("k", _like(k)), ("k", _like(v))],
        [(kernels.block, K), (kernels.block, K)],
        kernels.cost(4, B * H, q, k, v, dy, k, v),
    )


def _attention_backward_keys(
    kernels, q, k, v, dy, logs, means, drawn, query_id, key_id, dk, dv, keys, values
):
    b, g, j, n, step = (pl.program_id(axis) for axis in range(5))
    groups, shared, steps = (pl.num_programs(axis) for axis in (1, 3, 4))
    head = (b * groups + g) * shared + n
    i, any_seen = kernels.queries(j, step)

    @pl.when((n == 0) & (step == 0))
    def _():
        keys[...] = jnp.zeros(keys.shape, jnp.float32)
        values[...] = jnp.zeros(values.shape, jnp.float32)

    @pl.when(any_seen)
    def _():
        ids = _pair(query_id, key_id)
        weights, d_scores = _weights(kernels, q, k, v, dy, logs, means, drawn, ids, head, i, j)
        values[...] += kernels.product(weights, dy[...], (1, 0))
        keys[...] += kernels.product(d_scores, q[...], (1, 0))

    @pl.when((n == shared - 1) & (step == steps - 1))
    def _():
        dk[...] = keys[...].astype(dk.dtype)
        dv[...] = values[...].astype(dv.dtype)
