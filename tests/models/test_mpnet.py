"""The biases by distance, which all layers share."""

import jax
import numpy as np
import pytest

from kd_jax.models import mpnet
from tests.models import tiny


def test_buckets_are_those_of_transformers():
    torch = pytest.importorskip("torch")
    modeling = pytest.importorskip("transformers.models.mpnet.modeling_mpnet")
    distances = np.arange(-600, 601)
    wanted = modeling.MPNetEncoder.relative_position_bucket(torch.from_numpy(distances))
    np.testing.assert_array_equal(mpnet.buckets(distances), wanted)


def test_every_layer_trains_them():
    model, batch = tiny.model("mpnet", "none", num_hidden_layers=2), tiny.batch("mpnet", length=9)

    def loss(params):
        return (model.replace(params=params)(batch).features[0] ** 3).sum()

    table = jax.jit(jax.grad(loss))(model.params)["backbone"]["distances"]["embedding"]
    near = np.abs(table).sum(axis=1) > 0
    assert near.tolist() == [d <= 8 for d in range(16)] + [0 < d <= 8 for d in range(16)]
