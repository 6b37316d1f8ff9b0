import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from kd_jax.train import checkpoint, sharding
from kd_jax.train.checkpoint import checksum

MESH = sharding.make_mesh(4)
ARRAYS = [
    np.arange(24, dtype=np.float32).reshape(4, 6) / 7,
    np.float32([-0.0]),
    np.int32(3),
    np.full((2, 3, 4), np.nan, jnp.bfloat16),
    np.zeros((0, 5), np.float32),
]


@pytest.mark.parametrize("array", ARRAYS, ids=str)
def test_host_and_device_sum_alike(array):
    assert int(checkpoint._sum(np.asarray(array), np)) == int(
        checkpoint._compiled(jnp.asarray(array))
    )


def test_the_layout_does_not_matter():
    tree = {"a": ARRAYS[0], "b": [ARRAYS[2]]}
    whole = checksum(jax.device_put(tree))
    split = {"a": jax.device_put(ARRAYS[0], NamedSharding(MESH, P("fsdp"))), "b": [jnp.int32(3)]}
    assert checksum(split) == whole
    assert int(checkpoint._compiled(split["a"])) == int(checkpoint._sum(ARRAYS[0], np))


def test_every_bit_counts_and_so_does_its_place():
    array = ARRAYS[0]
    sums = {checksum([jnp.asarray(array)])}
    for byte in range(array.nbytes):
        changed = bytearray(array.tobytes())
        changed[byte] ^= 1 << byte % 8
        sums.add(checksum([jnp.asarray(np.frombuffer(changed, np.float32).reshape(4, 6))]))
    sums |= {checksum([jnp.asarray(array[::-1])]), checksum([jnp.asarray(array.T)])}
    sums |= {
        checksum({"a": jnp.asarray(array)}),
        checksum([jnp.asarray(array.reshape(6, 4))]),
    }
    assert len(sums) == 1 + array.nbytes + 3  # of another shape with the same words it is the same
