"""Attention from one more token, with kept keys and values, against that of whole rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax.models.attention import Scope, attention
from kd_jax.models.cache import filled
from kd_jax.precision import Policy
from kd_jax.types import Heads

H, G, K = 4, 2, 8
LENGTHS, PADDED, NEW = np.array([5, 2, 0]), 5, 3  # the last row begins here


@pytest.mark.parametrize("window", [None, 3])
def test_new_tokens_see_what_they_see_in_whole_rows(window):
    rng = np.random.default_rng(0)
    B, T = len(LENGTHS), PADDED + NEW
    q, k, v = (rng.standard_normal((B, T, n, K), np.float32) for n in (H, G, G))
    whole = Scope(np.ones((B, T), bool), causal=True)
    wanted = attention(q, k, v, whole, 0.5, 0.0, None, 0, Policy(), window)
    real_BT = np.arange(PADDED)[None] < LENGTHS[:, None]
    before = (Heads(None, *(np.where(real_BT[..., None, None], x[:, :PADDED], 9) for x in (k, v))),)
    cache = filled(before, jnp.asarray(real_BT), NEW)
    for new in range(NEW):
        at = (np.arange(B), LENGTHS + new)
        q_B1HK, k_B1GK, v_B1GK = (x[at][:, None] for x in (q, k, v))
        cache = cache.next()
        past = cache.of_layer(0).extended(k_B1GK, v_B1GK)
        found = jax.jit(past.attend, static_argnums=(1, 2))(0.5 * q_B1HK, window, Policy())
        np.testing.assert_allclose(found[:, 0], np.asarray(wanted)[at], rtol=1e-5, atol=1e-6)
        cache = cache.replace(past=((past.k_BGKS, past.v_BGKS),))
    assert cache.lengths_B.tolist() == (LENGTHS + NEW).tolist() and cache.used == PADDED + NEW
