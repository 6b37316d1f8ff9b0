import jax.numpy as jnp
import numpy as np

from kd_jax.types import Batch, ModelOutput, Ratio


def masked_batch():
    """Two rows of five tokens, three slots each; row 0 has one unused slot, row 1 two."""
    return Batch(
        ids_B=jnp.arange(2),
        tokens_BT=jnp.arange(10, 20).reshape(2, 5),
        mask_BT=jnp.ones((2, 5), jnp.float32),
        labels=jnp.array([[7, 8, 99], [9, 99, 99]]),
        weights=jnp.array([[1.0, 0.5, 0.0], [1.0, 0.0, 0.0]]),
        # Unused slots repeat a used position (row 0) or an unused one (row 1).
        positions_BP=jnp.array([[3, 1, 3], [4, 0, 0]]),
    )


def test_dense_puts_labels_and_weights_where_they_belong():
    batch = masked_batch()
    dense = batch.dense()
    assert dense.positions_BP is None
    np.testing.assert_array_equal(dense.labels, [[0, 8, 0, 7, 0], [0, 0, 0, 0, 9]])
    np.testing.assert_array_equal(dense.weights, [[0, 0.5, 0, 1, 0], [0, 0, 0, 0, 1]])
    assert dense.labels.dtype == batch.labels.dtype
    assert dense.tokens_BT is batch.tokens_BT and dense.ids_B is batch.ids_B


def test_dense_of_a_batch_without_positions_is_itself():
    dense = masked_batch().dense()
    assert dense.dense() is dense


def test_ratios_add_and_divide_once():
    halves = Ratio(jnp.float32(6.0), jnp.float32(3.0)), Ratio(jnp.float32(2.0), jnp.float32(1.0))
    uneven = Ratio(jnp.float32(30.0), jnp.float32(6.0))
    assert (halves[0] + halves[1]).value() == 2.0
    assert (halves[0] + uneven).value() == 4.0  # not (2 + 5) / 2


def test_a_ratio_of_nothing_is_zero():
    nothing = Ratio(jnp.float32(0.0), jnp.float32(0.0))
    assert nothing.value() == 0.0
    small = Ratio(jnp.float32(1e-3), jnp.float32(1e-3))
    assert (nothing + small).value() == 1.0


def test_logits_are_made_in_float32():
    output = ModelOutput(
        features=jnp.array([[1.0, 2.0]], jnp.bfloat16),
        unembed_VD=jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 2**-8]], jnp.float32),
        bias_V=None,
        hidden=(),
    )
    assert output.logits.dtype == jnp.float32
    np.testing.assert_array_equal(output.logits, [[1.0, 2.0, 1.0 + 2**-7]])
    biased = output.replace(bias_V=jnp.array([1.0, 0.0, -1.0]))
    np.testing.assert_array_equal(biased.logits, [[2.0, 2.0, 2**-7]])
