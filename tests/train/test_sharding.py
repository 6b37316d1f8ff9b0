import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from kd_jax import axes, tensors
from kd_jax.errors import UserError
from kd_jax.train import sharding
from kd_jax.types import Model
from tests.train import tiny_step

TABLE = (
    (r"embedding$", P(axes.VOCAB, None)),
    (r"kernel$", P(axes.FSDP, axes.MODEL)),
    (r"rows$", P((axes.MODEL, *axes.FSDP), None)),
    (r"bias$", P()),
)


def shape(mesh):
    """The sizes of axes that have one."""
    return {name: size for name, size in mesh.shape.items() if size > 1}


def test_mesh():
    assert shape(sharding.make_mesh()) == {"data": 8}
    mesh = sharding.make_mesh(2, model=2)
    assert shape(mesh) == {"data": 2, "fsdp": 2, "model": 2}
    # Neighbors share rows, then parameters.
    assert [d.id for d in mesh.devices[0].flat] == [0, 1, 2, 3]
    assert [d.id for d in mesh.devices[0, 0].flat] == [0, 1]
    assert sharding.num_parts(mesh) == 4
    assert sharding.make_mesh(1, jax.devices()[:3]).size == 3
    for fsdp in (3, 0, -1, 16):
        with pytest.raises(UserError, match=f"mesh.fsdp={fsdp} does not divide the 8 devices"):
            sharding.make_mesh(fsdp)
    with pytest.raises(UserError, match="mesh.fsdp=4 x mesh.model=4 do not divide the 8 devices"):
        sharding.make_mesh(4, model=4)


class Chip:
    """A TPU chip at a place of a torus, of one process."""

    process_index, platform, device_kind = 0, "tpu", "TPU v5 lite"

    def __init__(self, id, *coords):
        self.id, self.coords, self.core_on_chip, self.slice_index = id, coords, 0, 0


@pytest.mark.parametrize(
    ("sides", "fsdp", "rings"),
    [
        ((4, 4), 16, (4, 4)),
        ((4, 4), 4, (4, 1)),
        ((4, 4), 2, (2, 1)),
        ((8, 8), 64, (8, 8)),
        ((4, 4), 8, (4, 2)),
    ],
)
def test_fsdp_over_two_sides_of_a_torus_is_two_axes(sides, fsdp, rings):
    chips = [Chip(i, x, y, 0) for i, (y, x) in enumerate(np.ndindex(*sides))]
    mesh = sharding.make_mesh(fsdp, chips)
    assert (mesh.shape["fsdp"], mesh.shape["fsdp2"]) == rings
    assert mesh.shape["data"] == len(chips) // fsdp
    for line in mesh.devices[0, :, 0, 0], mesh.devices[0, 0, :, 0]:
        moved = np.ptp([chip.coords for chip in line], axis=0)
        assert (moved > 0).sum() <= 1, "an axis lies along one side"


def test_a_process_whose_devices_share_no_rows_is_refused():
    chips = [Chip(i, i, 0, 0) for i in range(8)]
    for chip in chips:
        chip.process_index = chip.id // 2
    with pytest.raises(UserError, match="mesh.model=4 does not divide the 2 devices of a process"):
        sharding.make_mesh(1, chips, model=4)


def test_first_pattern_wins_and_none_is_missing():
    tree = {"a": {"kernel": 0, "bias": 0}, "b": [{"kernel": 0}]}
    table = (("^b/0", "first"), ("kernel", "second"), ("bias", "third"))
    assert sharding.match(table, tree, "x") == {
        "a": {"kernel": "second", "bias": "third"},
        "b": [{"kernel": "first"}],
    }
    with pytest.raises(UserError, match="my table: no pattern covers a/bias, b/0/kernel"):
        sharding.match((("a/kernel", 1),), tree, "my table")


def test_dimensions_that_axes_do_not_divide_stay_whole():
    shapes = {
        "embedding": (8, 7),
        "odd": {"embedding": (7, 8), "kernel": (6, 3), "bias": (6,)},
        "kernel": (8, 6),
        "stacked": {"kernel": (3, 8, 6), "rows": (3, 8, 6)},
        "half": {"rows": (6, 8)},
    }
    tree = jax.tree.map(jnp.zeros, shapes, is_leaf=lambda x: isinstance(x, tuple))
    found = sharding.param_specs(TABLE, tree, sharding.make_mesh(4, model=2))
    assert found == {
        "embedding": P(("fsdp", "model"), None),
        "odd": {"embedding": P(), "kernel": P(), "bias": P()},
        "kernel": P("fsdp", "model"),
        "stacked": {"kernel": P(None, "fsdp", "model"), "rows": P(None, ("model", "fsdp"), None)},
        "half": {"rows": P("model", None)},
    }
    whole = sharding.param_specs(TABLE, tree, sharding.make_mesh(1))
    assert set(jax.tree.leaves(whole, is_leaf=lambda x: isinstance(x, P))) == {P()}


@pytest.mark.parametrize("fsdp", [1, 2, 8])
def test_reduce_sums_what_every_device_has(fsdp):
    """Over all devices; gradients of parts, which are sums already, over `data` alone."""
    mesh = sharding.make_mesh(fsdp)
    params = {"kernel": jnp.arange(48.0).reshape(8, 6), "bias": jnp.arange(6.0)}
    specs = sharding.param_specs(TABLE, params, mesh)

    def local(params, factor):
        return sharding.reduce(jax.tree.map(lambda x: x * factor[0], params), specs)

    factors = jnp.arange(8.0)
    run = jax.shard_map(
        local, mesh=mesh, in_specs=(specs, sharding.BATCH), out_specs=specs, check_vma=False
    )
    found = jax.jit(run)(params, factors)
    np.testing.assert_array_equal(found["bias"], 28 * params["bias"])
    over_data = np.repeat(factors.reshape(-1, fsdp).sum(axis=0), 8 // fsdp)[:, None]
    wanted = (28.0 if fsdp == 1 else over_data) * params["kernel"]
    np.testing.assert_array_equal(found["kernel"], wanted)


def test_devices_are_numbered_as_their_rows():
    mesh = sharding.make_mesh(2)
    run = jax.shard_map(
        lambda rows: rows * 0 + axes.index(axes.ROWS),
        mesh=mesh,
        in_specs=sharding.BATCH,
        out_specs=sharding.BATCH,
    )
    found = jax.jit(run)(jnp.zeros(16, jnp.uint32))
    assert found.dtype == jnp.uint32
    np.testing.assert_array_equal(found, np.repeat(np.arange(8), 2))


def test_each_device_gets_its_parts_of_models_its_own_rows_and_the_numbers():
    mesh, batch = sharding.make_mesh(4), tiny_step.batch("mlm")
    model = Model({"kernel": jnp.arange(32.0).reshape(8, 4)}, None)

    def run(model, none, batch, number):
        assert none is None and batch.tokens_BT.shape == (4, 12)
        assert model.params["kernel"].shape == (2, 4)
        whole = axes.gathered(model.params["kernel"], axes.FSDP)
        return batch.tokens_BT * number, jax.lax.psum(whole, axes.ROWS)

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


def test_puts_parts_on_their_devices():
    """Of a lazy tensor each part is read once, although several devices have it."""
    mesh, places = sharding.make_mesh(4), []
    whole = np.arange(48, dtype=np.float32).reshape(8, 6)
    lazy = tensors.of_array(whole, np.float32).checked(lambda part, at: places.append(at))
    given = {"lazy": lazy, "numpy": whole, "jax": jnp.asarray(whole)}
    specs = dict.fromkeys(given, P("fsdp", None)) | {"all": P()}
    found = sharding.put(given | {"all": lazy.astype("bfloat16")}, specs, mesh)
    for name, array in found.items():
        assert array.sharding == jax.sharding.NamedSharding(mesh, specs[name])
        np.testing.assert_array_equal(array, whole)
    assert found["all"].dtype == "bfloat16"
    rows = [(at[0].start, at[0].stop) for at in places]
    assert sorted(rows) == [(0, 2), (0, 8), (2, 4), (4, 6), (6, 8)]


def test_the_first_process_has_it_all():
    array = jnp.arange(6.0)
    found = sharding.gathered({"a": array, "b": tensors.of_array(np.ones(2), np.float32)})
    assert isinstance(found["a"], np.ndarray) and isinstance(found["b"], np.ndarray)
    np.testing.assert_array_equal(found["a"], array)
