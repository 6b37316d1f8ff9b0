import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from kd_jax.models import layers
from kd_jax.models.layers import dropout, keep_mask
from kd_jax.precision import Policy
from kd_jax.train import sharding

SHAPE = (64, 1024)
N = 64 * 1024


def kept(seed=0, site=0, rate=0.5, shape=SHAPE):
    return np.asarray(keep_mask(shape, rate, jnp.uint32(seed), site))


def correlation(a, b):
    """Of two masks; independent ones stay within a few 1/sqrt(N)."""
    return np.corrcoef(a.ravel(), b.ravel())[0, 1]


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_rate(rate):
    sigma = np.sqrt(rate * (1 - rate) / N)
    for seed in (0, 1, 12345, 2**32 - 1):
        for site in (0, 7):
            assert abs(kept(seed, site, rate).mean() - (1 - rate)) < 4 * sigma


def test_rate_of_every_row_and_column():
    mask = kept(rate=0.1)
    for axis in (0, 1):
        sigma = np.sqrt(0.09 / mask.shape[axis])
        assert np.abs(mask.mean(axis) - 0.9).max() < 5 * sigma
        # As spread out as independent draws are, neither more nor less.
        assert 0.8 < mask.mean(axis).std() / sigma < 1.2


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_sites_and_seeds_are_independent(rate):
    limit = 4.5 / np.sqrt(N)
    first = kept(seed=3, site=2, rate=rate)
    others = [(3, 3), (3, 1), (4, 2), (2, 2), (2, 3), (4, 1), (3 + 2**31, 2)]
    others += [(3 + 0x9E3779B9, 2), (3 + 0x85EBCA6B, 2)]  # what devices and micro-batches add
    for seed, site in others:
        assert abs(correlation(first, kept(seed % 2**32, site, rate))) < limit, (seed, site)


def test_elements_are_independent():
    mask, limit = kept(), 4.5 / np.sqrt(N)
    for shift in (1, 2, 3, 64, 512, 1023):
        assert abs(correlation(mask, np.roll(mask, shift, axis=1))) < limit, shift
    for shift in (1, 2, 31, 32):
        assert abs(correlation(mask, np.roll(mask, shift, axis=0))) < limit, shift


def test_mask_depends_on_the_flat_index_alone():
    np.testing.assert_array_equal(kept(5, shape=(4, 6, 8)).ravel(), kept(5, shape=(192,)))


def test_kept_values_are_scaled_and_the_mean_stays():
    x = jnp.full(SHAPE, 3.0)
    y = np.asarray(dropout(x, 0.25, jnp.uint32(1), 0))
    np.testing.assert_array_equal(y != 0, kept(1, rate=0.25))
    np.testing.assert_allclose(y[y != 0], 4.0, rtol=1e-6)
    assert abs(y.mean() - 3.0) < 0.05


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradient_takes_the_mask_of_the_forward_pass(dtype):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 16)) + 9, dtype)
    seed = jnp.uint32(11)

    @jax.jit
    def both(x, seed):
        y, pull = jax.vjp(lambda x: dropout(x, 0.3, seed, 4), x)
        return y, pull(jnp.ones_like(y))[0]

    y, slope = both(x, seed)
    assert y.dtype == slope.dtype == jnp.dtype(dtype)
    np.testing.assert_array_equal(slope != 0, y != 0)
    assert set(np.unique(np.asarray(slope, np.float32)).tolist()) == {
        0.0,
        float(jnp.asarray(1.0, dtype) / jnp.asarray(0.7, dtype)),
    }


def test_same_seed_same_mask_in_any_program():
    x, seed = jnp.ones((8, 16)), jnp.uint32(2)
    eager = dropout(x, 0.5, seed, 1)
    np.testing.assert_array_equal(jax.jit(lambda x, s: dropout(x, 0.5, s, 1))(x, seed), eager)
    remat = jax.checkpoint(lambda x: dropout(x, 0.5, seed, 1).sum())
    np.testing.assert_array_equal(jax.jit(jax.grad(remat))(x), eager)


def test_off():
    x = jnp.ones((4, 4))
    assert dropout(x, 0.5, None, 0) is x
    assert dropout(x, 0.0, jnp.uint32(0), 0) is x


def test_dropout_inside_an_mlp_is_the_same_where_devices_have_some_columns():
    mlp = layers.Mlp(6, 8, "relu", 0.5, Policy(), gated=True, bias=False, drop_inside=True)
    graphdef, state = nnx.split(mlp)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: rng.standard_normal(x.shape, np.float32), nnx.to_pure_dict(state)
    )
    columns, rows = PartitionSpec(None, "model"), PartitionSpec("model", None)
    parts = {"gate": {"kernel": columns}, "up": {"kernel": columns}, "down": {"kernel": rows}}

    def run(params, x_BTD):
        return nnx.merge(graphdef, params)(x_BTD, jnp.uint32(3), 5)

    mesh = sharding.make_mesh(1, jax.devices()[:2], 2)
    split = {"in_specs": (parts, PartitionSpec()), "out_specs": PartitionSpec()}
    x_BTD = rng.standard_normal((2, 5, 6), np.float32)
    found = jax.jit(jax.shard_map(run, mesh=mesh, check_vma=False, **split))(params, x_BTD)
    np.testing.assert_allclose(found, jax.jit(run)(params, x_BTD), rtol=1e-5, atol=1e-5)
