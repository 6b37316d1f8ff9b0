import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax.models.attention import attention
from kd_jax.plans import compiled
from kd_jax.precision import Policy

B, H, G, K = 2, 4, 2, 8


def inputs(length):
    """q, k, v and a causal mask; the second row ends in padding, and padding sees nothing."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((B, length, n, K), np.float32) for n in (H, G, G))
    mask = np.tril(np.ones((B, 1, length, length), bool))
    mask[1, :, :, length // 2 :] = False
    mask[1, :, -3:] = False
    return q, k, v, mask


def plain(q, k, v, mask):
    """As the formula has it, in float64."""
    k, v = (np.repeat(x, H // G, axis=2).astype(np.float64) for x in (k, v))
    scores = np.where(mask, np.einsum("bthk,bshk->bhts", 0.5 * q, k), -1e9)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhts,bshk->bthk", weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("length", [40, 150, 600])  # one block of queries, two and a bit, eight
def test_without_dropout(length):
    run = functools.partial(attention, scale=0.5, rate=0.1, seed=None, site=0, policy=Policy())
    made = inputs(length)
    for causal in (False, True):
        found = jax.jit(functools.partial(run, causal=causal))(*made)
        np.testing.assert_allclose(found, plain(*made), rtol=1e-4, atol=1e-5)


def test_blocks_compute_fewer_scores():
    run = functools.partial(attention, scale=1.0, rate=0.0, seed=None, site=0, policy=Policy())
    cost = {
        causal: compiled.cost(
            jax.jit(functools.partial(run, causal=causal)).lower(*inputs(512)).compile().as_text()
        ).flops
        for causal in (False, True)
    }
    assert cost[True] == cost[False] * (1 + 8) / 2 / 8  # eight blocks, each with one more


def test_gradient_is_that_of_the_path_with_dropout():
    q, k, v, mask = inputs(150)

    def loss(q, k, v, seed, causal):
        y = attention(q, k, v, mask, 0.5, 0.0, seed, 0, Policy(), causal)
        return jnp.sum(jnp.sin(y))

    grad = jax.grad(loss, argnums=(0, 1, 2))
    wanted = grad(q, k, v, jnp.uint32(1), False)
    for found, want in zip(grad(q, k, v, None, True), wanted, strict=True):
        np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)
