import functools

import jax
import numpy as np
import pytest

from kd_jax.data.continuations import Rows
from kd_jax.models import family
from kd_jax.precision import Policy
from kd_jax.train import sharding
from kd_jax.train.passes import log_likelihoods
from tests.data.test_continuations import stretches
from tests.models import tiny


@functools.cache
def example():
    """Questions with two or three endings, tokens of the tiny vocabulary; rows of two lengths."""
    rng = np.random.default_rng(0)
    made, owners = stretches(*[(int(n), 3, 2, 4)[: 3 + n % 2] for n in rng.integers(3, 25, 21)])
    return Rows(made, 40, owners)


def found(devices, fsdp, batch_size):
    mesh = sharding.make_mesh(fsdp, jax.devices()[:devices])
    rows, model = example(), tiny.model("gpt2", "clm", vocab_size=1024)
    batches = rows.batches(batch_size, devices)
    values = log_likelihoods(model, batches, rows.branches, Policy(), mesh, family.PARTITION)
    assert sorted(values) == list(range(len(rows)))  # none of the rows that fill a batch up
    return rows.by_stretch(values)


@pytest.mark.parametrize(("devices", "fsdp", "batch_size"), [(8, 1, 16), (8, 4, 24), (1, 1, 30)])
def test_neither_devices_nor_batches_change_a_score(devices, fsdp, batch_size):
    wanted = found(1, 1, 6)
    assert wanted.max() < 0 and np.unique(wanted).size == len(wanted) > 50
    np.testing.assert_allclose(found(devices, fsdp, batch_size), wanted, rtol=1e-5, atol=1e-4)
