import numpy as np
import pytest

from kd_jax.evals import likelihood


def test_differences():
    one, two = np.array([-1.0, -2.0, np.nan, -3.0]), np.array([-1.5, -1.0, np.nan, -3.0])
    found = likelihood.difference(one, two)
    assert found["mean_difference"] == pytest.approx(0.5)
    assert found["largest_difference"] == 1.0
    assert found["mean_change"] == pytest.approx(0.5 / 3)
    assert found["mean_difference_error"] == pytest.approx(np.std([0.5, 1, 0], ddof=1) / 3**0.5)
    assert likelihood.difference(one, one)["mean_difference"] == 0.0
    for other in (two[:3], np.zeros(4)):
        with pytest.raises(ValueError, match="not scored on the same endings"):
            likelihood.difference(one, other)


def hits(right, of=100):
    return np.arange(of) < right


@pytest.mark.parametrize(("right", "given"), [(30, False), (33, False), (36, True), (0, False)])
def test_retention_needs_an_original_above_chance(right, given):
    """Two standard errors above 0.25 are about 0.34 of 100 questions."""
    found = likelihood.retention(hits(right), hits(20), 0.25)
    assert (found["retention"] is not None) == given
    assert (found["retention_error"] is not None) == given


def test_retention():
    original, changed = hits(60), np.roll(hits(45), 5)
    found = likelihood.retention(original, changed, 0.25)
    assert found["retention"] == pytest.approx(0.75)
    assert found["agreement"] == pytest.approx((45 + 40) / 100)
    same = likelihood.retention(original, original, 0.25)
    assert (same["retention"], same["retention_error"], same["agreement"]) == (1.0, 0.0, 1.0)


def test_the_error_is_that_of_drawing_the_questions_again():
    rng = np.random.default_rng(0)
    original = rng.random(2000) < 0.6
    changed = np.where(rng.random(2000) < 0.8, original, rng.random(2000) < 0.3)
    drawn = rng.integers(0, 2000, (3000, 2000))
    ratios = changed[drawn].mean(1) / original[drawn].mean(1)
    found = likelihood.retention(original, changed, 0.25)
    assert found["retention_error"] == pytest.approx(ratios.std(), rel=0.05)


def test_compare_names_every_accuracy():
    one, two = {"acc": hits(60), "acc_norm": hits(26)}, {"acc": hits(30), "acc_norm": hits(26)}
    found = likelihood.compare(np.zeros(4), np.ones(4), one, two, 0.25)
    assert found["mean_difference"] == 1.0 and found["acc_retention"] == 0.5
    assert found["acc_norm_retention"] is None and found["acc_norm_agreement"] == 1.0
    assert "retention" not in str(likelihood.compare(np.zeros(4), np.ones(4), {}, {}, None))
