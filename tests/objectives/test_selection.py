"""Positions that are chosen by entropy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax.objectives.logits import Head
from kd_jax.objectives.selection import Selection, entropy
from tests.objectives import naive
from tests.objectives.rows import FP32


def test_entropy():
    draw = np.random.default_rng(0).normal
    features_ND, unembed_VD = draw(size=(7, 4)), 2 * draw(size=(9, 4))
    probs_NV = naive.softmax(features_ND @ unembed_VD.T, 1.0)
    source = Head(jnp.float32(features_ND), jnp.float32(unembed_VD), None)
    found = jax.jit(lambda source: entropy(source, FP32, 3))(source)
    np.testing.assert_allclose(found, -(probs_NV * np.log(probs_NV)).sum(1), rtol=1e-5)


@pytest.mark.parametrize(
    ("share", "seen", "wanted"), [(0.001, 1, 1), (0.001, 1001, 2), (0.2, 5, 1), (0.2, 30_000, 6000)]
)
def test_a_share_is_rounded_up(share, seen, wanted):
    chosen = Selection("student_entropy", share)
    assert chosen.denominator(jnp.ones((1, seen))) == wanted


def test_the_share_of_each_row_with_the_highest_entropy():
    entropy_BP = jnp.array([[3.0, 9.0, 5.0, 8.0, 1.0], [1.0, 1.0, 2.0, 7.0, 6.0], [1.0] * 5])
    weights_BP = jnp.array([[1.0, 0.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0, 1.0], [0.0] * 5])
    for share, wanted in (
        (0.2, [[0, 0, 0, 1, 0], [0, 0, 0, 1, 0], [0] * 5]),
        (0.5, [[0, 0, 1, 1, 0], [0, 0, 1, 1, 1], [0] * 5]),
        (0.75, [[1, 0, 1, 1, 0], [1, 0, 1, 1, 1], [0] * 5]),
        (1.0, weights_BP),
    ):
        chosen = Selection("student_entropy", share)
        found = chosen.weights(weights_BP, entropy_BP)
        np.testing.assert_array_equal(found, wanted, err_msg=str(share))
        assert chosen.denominator(weights_BP) == pytest.approx(float(found.sum()))
