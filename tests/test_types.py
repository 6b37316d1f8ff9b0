import jax.numpy as jnp
import numpy as np

from kd_jax.types import Ratio
from tests.objectives.outputs import batch


def test_dense_supervision_is_the_same_at_every_token():
    sparse = batch(positions=True)
    dense = sparse.dense()
    assert dense.positions_BP is None
    labels, weights = np.zeros((4, 6), np.int32), np.zeros((4, 6), np.float32)
    for row, slot in np.ndindex(4, 2):  # the third slot is unused, and repeats position 0
        at = sparse.positions_BP[row, slot]
        labels[row, at], weights[row, at] = sparse.labels[row, slot], sparse.weights[row, slot]
    np.testing.assert_array_equal(dense.labels, labels)
    np.testing.assert_array_equal(dense.weights, weights)
    assert dense.labels.dtype == sparse.labels.dtype
    assert dense.dense() is dense
    np.testing.assert_array_equal(dense.tokens_BT, sparse.tokens_BT)


def test_ratios_add_and_divide_once():
    ratio = Ratio(jnp.float32(3.0), jnp.float32(2.0)) + Ratio(jnp.float32(1.0), jnp.float32(6.0))
    assert ratio.value() == 0.5
    assert Ratio(jnp.float32(0.0), jnp.float32(0.0)).value() == 0.0
