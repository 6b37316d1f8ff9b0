import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax.models import attention as module
from kd_jax.models import flash
from kd_jax.models.attention import Scope, attention
from kd_jax.plans import compiled
from kd_jax.precision import Policy

B, H, G, K = 2, 4, 2, 8
SEED = jnp.uint32(5)


def inputs(length):
    """q, k, v, and which keys are tokens; the second row ends in padding."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((B, length, n, K), np.float32) for n in (H, G, G))
    real = np.ones((B, length), bool)
    real[1, -length // 3 :] = False
    return q, k, v, real


def segments(length):
    """A first row of a beginning and two continuations, a second one of three conversations."""
    numbers = np.repeat([[0, 1, 2], [1, 2, 3]], -(-length // 3), axis=1)[:, :length]
    return numbers.astype(np.int32)


def plain(q, k, v, mask, bias=0.0):
    """As the formula has it, in float64."""
    k, v = (np.repeat(x, H // G, axis=2).astype(np.float64) for x in (k, v))
    scores = np.where(mask, np.einsum("bthk,bshk->bhts", 0.5 * q, k) + bias, -1e9)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhts,bshk->bthk", weights / weights.sum(-1, keepdims=True), v)


def attend(way, scope, rate=0.0, window=None, dtype="float32"):
    """The function of q, k and v, by one of the ways."""
    policy = Policy(dtype, dtype, way)
    seed = SEED if rate else None
    return lambda q, k, v: attention(q, k, v, scope, 0.5, rate, seed, 3, policy, window)


@pytest.fixture
def small(monkeypatch):
    """Lets short rows have several blocks, kernels run here, and cuDNN be stood in for."""
    monkeypatch.setattr(module, "_SCORES", B * H * 300 * 40)  # 40 queries at a time
    monkeypatch.setattr(flash, "_LARGEST", 128)
    monkeypatch.setattr(flash, "Kernels", functools.partial(flash.Kernels, interpret=True))
    fused = jax.nn.dot_product_attention

    def cudnn(*arrays, implementation, **told):
        assert implementation == "cudnn" and {x.dtype for x in arrays} != {jnp.float32}
        calls.append(set(told))
        return fused(*arrays, implementation="xla", **told)

    calls = []
    monkeypatch.setattr(jax.nn, "dot_product_attention", cudnn)
    return calls


@pytest.mark.parametrize("length", [40, 150, 600])  # one block of queries, two and a bit, eight
def test_without_dropout(length):
    *qkv, real = inputs(length)
    lower = np.tril(np.ones((length, length), bool))
    run = jax.jit(lambda scope, *qkv: attend("explicit", scope)(*qkv))
    for causal in (False, True):
        mask = real[:, None, None] & (lower if causal else True)
        found = run(Scope(real, causal=causal), *qkv)
        np.testing.assert_allclose(found, plain(*qkv, mask), rtol=1e-4, atol=1e-5)


def test_blocks_compute_fewer_scores():
    *qkv, real = inputs(512)
    cost = {
        causal: compiled.cost(
            jax.jit(attend("explicit", Scope(real, causal=causal))).lower(*qkv).compile().as_text()
        ).flops
        for causal in (False, True)
    }
    assert cost[True] == cost[False] * (1 + 8) / 2 / 8  # eight blocks, each with one more


def test_gradient_is_that_of_the_path_with_dropout():
    *qkv, real = inputs(150)
    scope = Scope(real, causal=True)

    def loss(q, k, v, scope, seed):
        return jnp.sum(jnp.sin(attention(q, k, v, scope, 0.5, 0.0, seed, 0, Policy())))

    grad = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    for found, want in zip(grad(*qkv, scope, None), grad(*qkv, scope, SEED), strict=True):
        np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)


def test_what_queries_see():
    real, packed = np.array([[1, 1, 1, 1, 1, 0]], bool), np.array([[0, 0, 1, 1, 2, 0]])
    rows = Scope(real, packed, np.array([[0, 1, 2, 3, 2, 5]]), causal=True)

    def seen(scope, window=None, first=0, queries=6):
        found = np.broadcast_to(scope.mask(first, queries, 6, window), (1, 1, queries, 6))[0, 0]
        return ["".join(map(str, np.flatnonzero(row))) for row in found]

    assert seen(Scope(real)) == ["01234"] * 6
    assert seen(Scope(real, causal=True)) == ["0", "01", "012", "0123", "01234", "01234"]
    assert seen(Scope(real, causal=True), 2) == ["0", "01", "12", "23", "34", "4"]
    assert seen(rows) == ["0", "01", "012", "0123", "014", "01"]
    assert seen(rows, 2)[:5] == ["0", "01", "12", "23", "14"]  # position 2 comes after 1


def test_what_queries_see_in_a_window_on_both_sides():
    scope = Scope(np.array([[1, 1, 1, 1, 1, 0]], bool))
    found = scope.mask(1, 3, 6, 3, begin=1)[0, 0]
    assert found.tolist() == [[1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 1, 1, 1, 0]]
    assert scope.mask(0, 6, 6, 13).all(axis=(0, 1, 2)).tolist() == [True] * 5 + [False]


def test_biases_go_by_the_distance():
    bias_H2T = np.arange(20.0, dtype=np.float32).reshape(2, 10)  # of 0 ... 4, -5 ... -1
    scope = Scope(np.ones((1, 5), bool), bias_H2T=jnp.asarray(bias_H2T))
    distance = np.arange(5)[None] - np.arange(5)[:, None]
    np.testing.assert_array_equal(scope.bias(0, 5, 5, 0)[0], bias_H2T[:, distance])
    some = jax.jit(lambda first: scope.bias(first, 2, 4, 1))(jnp.int32(3))
    np.testing.assert_array_equal(some[0], bias_H2T[:, distance[3:5, 1:4]])


@pytest.mark.parametrize("way", ["explicit", "pallas"])  # all at once, and in blocks of queries
def test_biases_are_added(way, small, monkeypatch):
    monkeypatch.setattr(module, "SHORT", 1)
    *qkv, real = inputs(150)
    bias_H2T = 3 * np.random.default_rng(2).standard_normal((H, 300), np.float32)
    distance = np.arange(150)[None] - np.arange(150)[:, None]
    seen = real[:, None, None] & (abs(distance) <= 10)
    run = jax.jit(lambda scope, *qkv: attend(way, scope, window=21)(*qkv))
    found = run(Scope(real, bias_H2T=bias_H2T), *qkv)
    found, wanted = (
        x * real[:, :, None, None] for x in (found, plain(*qkv, seen, bias_H2T[:, distance]))
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


CASES = {
    "causal": {},
    "causal, window": {"window": 150},
    "segments": {"segments": True},
    "segments, window": {"segments": True, "window": 40},
    "both": {"causal": False},
    "both, window": {"causal": False, "window": 101},
}


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def results(way, rate, window, dtype, qkv, real, scope, dy):
    """What comes out of queries that are no padding, and the gradients."""
    y, pull = jax.vjp(attend(way, scope, rate, window, dtype), *qkv)
    return y * real[:, :, None, None], *pull(dy)


@functools.cache
def given(case, dtype):
    """Arguments of `results`, without the way and the rate, which come first."""
    causal, window = CASES[case].get("causal", True), CASES[case].get("window")
    *qkv, real = inputs(300)
    scope = Scope(real, causal=causal)
    if "segments" in CASES[case]:
        scope = scope.replace(segments_BS=segments(300), places_BS=np.arange(300)[None] % 100)
    dy = np.random.default_rng(1).standard_normal(qkv[0].shape) * real[:, :, None, None]
    *qkv, dy = (jnp.asarray(x, dtype) for x in (*qkv, dy))
    return window, dtype, qkv, real, scope, dy


@functools.cache
def explicit(case, rate, dtype):
    """The results of the explicit way with all scores at once."""
    small, module._SCORES = module._SCORES, 2**26
    try:
        return jax.device_get(results("explicit", rate, *given(case, dtype)))
    finally:
        module._SCORES = small


@pytest.mark.parametrize("rate", [0.0, 0.1])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("way", ["blocks", "pallas", "cudnn"])
def test_every_way_is_the_explicit_one(way, case, rate, small):
    dtype = "bfloat16" if way == "cudnn" else "float32"
    wanted = explicit(case, rate, dtype)
    within = 3e-2 if way == "cudnn" else 2e-5
    for found, want in zip(results(way, rate, *given(case, dtype)), wanted, strict=True):
        assert found.dtype == dtype
        error = np.abs(np.asarray(found - want, np.float32)).max()
        assert error <= within * np.abs(np.asarray(want, np.float32)).max()
    told = {"causal": {"is_causal"}, "both": {"is_causal", "key_value_seq_lengths"}}
    told |= {
        "causal, window": {"is_causal", "local_window_size"},
        "segments": {"is_causal", "mask"},
        "both, window": {"is_causal", "key_value_seq_lengths", "mask"},
    }
    if way == "cudnn" and rate == 0.0 and case in told:
        assert small == [told[case] | {"scale"}]
    else:
        assert not small


def test_bf16_on_a_tpu_follows_fp32(small):
    *qkv, real = inputs(300)
    scope, halves = Scope(real, causal=True), [jnp.asarray(x, jnp.bfloat16) for x in qkv]
    run = jax.jit(lambda scope, *qkv: attend("explicit", scope, 0.1)(*qkv))
    wanted = run(scope, *qkv)
    run = jax.jit(lambda scope, *qkv: attend("pallas", scope, 0.1, dtype="bfloat16")(*qkv))
    found = run(scope, *halves)
    assert found.dtype == jnp.bfloat16
    error = np.std(np.asarray(found - wanted)[real]) / np.std(np.asarray(wanted)[real])
    assert 1e-4 < error < 1e-2


@pytest.mark.parametrize("rate", [0.0, 0.1])
@pytest.mark.parametrize("way", ["blocks", "explicit"])
def test_no_array_has_all_scores(way, rate, monkeypatch):
    monkeypatch.setattr(module, "_SCORES", B * H * 1024 * 64)
    *qkv, real = inputs(1024)

    def loss(q, k, v, real):
        return attend(way, Scope(real, causal=True), rate)(q, k, v).sum()

    text = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*qkv, real).compile().as_text()
    largest = max(int(np.prod(dims)) for _, dims in compiled.arrays(text))
    assert largest <= B * H * 1024 * 128
