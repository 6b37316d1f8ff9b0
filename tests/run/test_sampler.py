"""Text written on a mesh: the same as on one device, whatever is split."""

import jax
import numpy as np
import pytest

from kd_jax.models import family
from kd_jax.models.generate import Sampling
from kd_jax.run.sampler import write_on_mesh
from kd_jax.train import sharding
from tests.models import tiny

ROWS, LENGTH = 16, 8
SAMPLING = Sampling(6, temperature=1.0, top_p=0.9, stop=tuple(range(4, 14)))


def written(devices, fsdp=1, model=1):
    mesh = sharding.make_mesh(fsdp, jax.devices()[:devices], model)
    ours = tiny.model("llama", num_key_value_heads=4, num_attention_heads=4)
    specs = sharding.param_specs(family.PARTITION, ours.params, mesh)
    ours = ours.replace(params=sharding.put(ours.params, specs, mesh))
    rng = np.random.default_rng(0)
    tokens_BT = rng.integers(4, tiny.VOCAB, (ROWS, LENGTH))
    lengths_B, rows_B = rng.integers(1, LENGTH + 1, ROWS), np.arange(ROWS)
    limits_B = np.where(rows_B < 2, rows_B * 3, 6)
    numbers = lengths_B, limits_B, rows_B, 7, SAMPLING
    return jax.device_get(write_on_mesh(mesh, family.PARTITION, ours, tokens_BT, *numbers))


@pytest.fixture(scope="module")
def alone():
    return written(1)


@pytest.mark.parametrize("fsdp, model", [(1, 1), (4, 1), (2, 2)])
def test_eight_devices_write_what_one_writes(alone, fsdp, model):
    found = written(8, fsdp, model)
    assert found.tokens_BN.tolist() == alone.tokens_BN.tolist()
    assert found.counts_B.tolist() == alone.counts_B.tolist()
    assert found.ended_B.tolist() == alone.ended_B.tolist()
    np.testing.assert_allclose(found.logp_BN, alone.logp_BN, atol=1e-5)


def test_rows_end_by_themselves(alone):
    assert alone.counts_B[0] == 0 and alone.counts_B[1] <= 3 and 6 in alone.counts_B
    ends = alone.tokens_BN[np.arange(ROWS), alone.counts_B - 1]
    ends = (4 <= ends) & (ends < 14)
    assert alone.ended_B.any() and (alone.ended_B == ends)[1:].all()
