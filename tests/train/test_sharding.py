import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from kd_jax import axes
from kd_jax.errors import UserError
from kd_jax.train import sharding
from kd_jax.types import Model
from tests.train import tiny_step

TABLE = ((r"embedding$", P(None, "fsdp")), (r"kernel$", P("fsdp", None)), (r"bias$", P()))


def test_mesh():
    assert dict(sharding.make_mesh().shape) == {"data": 8, "fsdp": 1}
    mesh = sharding.make_mesh(4)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 4}
    assert [d.id for d in mesh.devices[0]] == [0, 1, 2, 3]  # neighbours share the parameters
    assert sharding.make_mesh(1, jax.devices()[:3]).size == 3
    for fsdp in (3, 0, -1, 16):
        with pytest.raises(UserError, match=f"mesh.fsdp={fsdp} does not divide the 8 devices"):
            sharding.make_mesh(fsdp)


def test_first_pattern_wins_and_none_is_missing():
    tree = {"a": {"kernel": 0, "bias": 0}, "b": [{"kernel": 0}]}
    table = (("^b/0", "first"), ("kernel", "second"), ("bias", "third"))
    assert sharding.match(table, tree, "x") == {
        "a": {"kernel": "second", "bias": "third"},
        "b": [{"kernel": "first"}],
    }
    with pytest.raises(UserError, match="my table: no pattern covers a/bias, b/0/kernel"):
        sharding.match((("a/kernel", 1),), tree, "my table")


def test_dimensions_that_fsdp_does_not_divide_stay_whole():
    shapes = {"embedding": (7, 8), "odd": {"kernel": (6, 8), "bias": (6,)}, "kernel": (8, 6)}
    tree = jax.tree.map(jnp.zeros, shapes, is_leaf=lambda x: isinstance(x, tuple))
    specs = sharding.param_specs(TABLE, tree, sharding.make_mesh(4))
    assert specs == {
        "embedding": P(None, "fsdp"),
        "odd": {"kernel": P(), "bias": P()},
        "kernel": P("fsdp", None),
    }
    whole = sharding.param_specs(TABLE, tree, sharding.make_mesh(1))
    assert set(jax.tree.leaves(whole, is_leaf=lambda x: isinstance(x, P))) == {P()}


@pytest.mark.parametrize("fsdp", [1, 2, 8])
def test_gather_and_reduce(fsdp):
    """Whole parameters on every device, and the sum of what all devices computed."""
    mesh = sharding.make_mesh(fsdp)
    params = {"kernel": jnp.arange(48.0).reshape(8, 6), "embedding": jnp.arange(24.0).reshape(3, 8)}
    specs = sharding.param_specs(TABLE, params, mesh)

    def local(params, factor):
        whole = sharding.gather(params, specs)
        return sharding.reduce(jax.tree.map(lambda x: x * factor[0], whole), specs, mesh)

    factors = jnp.arange(8.0)
    run = jax.shard_map(
        local, mesh=mesh, in_specs=(specs, sharding.BATCH), out_specs=specs, check_vma=False
    )
    jax.tree.map(
        np.testing.assert_array_equal,
        jax.jit(run)(params, factors),
        jax.tree.map(lambda x: 28 * x, params),
    )


def test_devices_are_numbered_as_their_rows():
    mesh = sharding.make_mesh(2)
    run = jax.shard_map(
        lambda rows: rows * 0 + sharding.device_index(),
        mesh=mesh,
        in_specs=sharding.BATCH,
        out_specs=sharding.BATCH,
    )
    found = jax.jit(run)(jnp.zeros(16, jnp.uint32))
    assert found.dtype == jnp.uint32
    np.testing.assert_array_equal(found, np.repeat(np.arange(8), 2))


def test_each_device_gets_whole_models_its_own_rows_and_the_numbers():
    mesh, batch = sharding.make_mesh(4), tiny_step.batch("mlm")
    model = Model({"kernel": jnp.arange(32.0).reshape(8, 4)}, None)

    def run(model, none, batch, number):
        assert none is None and batch.tokens_BT.shape == (4, 12)
        return batch.tokens_BT * number, jax.lax.psum(model.params["kernel"], axes.ROWS)

    out = sharding.BATCH, P()
    found, sums = jax.jit(
        lambda number: sharding.per_device(run, mesh, TABLE, (model, None), batch, number, out=out)
    )(jnp.int32(3))
    np.testing.assert_array_equal(found, 3 * batch.tokens_BT)
    np.testing.assert_array_equal(sums, 8 * model.params["kernel"])


def test_place():
    batch = tiny_step.batch("mlm")
    placed = sharding.place(batch, sharding.make_mesh(2))
    jax.tree.map(np.testing.assert_array_equal, placed, batch)
    assert {s.data.shape for s in placed.tokens_BT.addressable_shards} == {(4, 12)}
