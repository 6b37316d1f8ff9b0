import numpy as np
import pytest
from scipy import stats

from kd_jax.evals import likelihood


def test_the_likeliest_ending_is_taken():
    values = [np.array([-3.0, -1.0]), np.array([-2.0, -5.0, -2.0])]
    assert likelihood.taken(values).tolist() == [1, 0]


def test_by_character():
    found = likelihood.per_character(np.array([-6.0, -6.0, -1.0]), ["abc", "abcdef", ""])
    assert found.tolist() == [-2.0, -1.0, -np.inf]
    assert likelihood.taken([found]).tolist() == [1]


@pytest.mark.parametrize(("right", "of"), [(0, 3), (27, 100), (1000, 1000)])
def test_shares_have_an_error_and_an_interval(right, of):
    hits = np.arange(of) < right
    found = likelihood.share(hits)
    p = right / of
    assert found["value"] == p and found["error"] == pytest.approx((p * (1 - p) / of) ** 0.5)
    wanted = stats.binomtest(right, of).proportion_ci(method="wilson")
    assert found["interval"] == pytest.approx([wanted.low, wanted.high])


def test_chance():
    assert likelihood.chance([4, 4, 2]) == pytest.approx((0.25 + 0.25 + 0.5) / 3)
