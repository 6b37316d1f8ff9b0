import numpy as np
import pytest

from kd_jax.evals import classification


def pearson(a, b):
    a, b = a - np.mean(a), b - np.mean(b)
    return (a * b).mean() / np.sqrt((a**2).mean() * (b**2).mean())


def ranks(values):
    """Mean rank of each value among all, by counting."""
    return np.array([(values < v).sum() + (values == v).sum() / 2 for v in values])


@pytest.mark.parametrize("seed", range(3))
def test_figures_are_their_formulas(seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 5, 30) / 2  # with ties
    predictions = (labels + rng.normal(size=30)).round(1).astype(np.float32)
    found = classification.regression(predictions, labels)
    exact = predictions.astype(np.float64)
    assert found["loss"] == pytest.approx(((exact - labels) ** 2).mean())
    assert found["pearson"] == pytest.approx(pearson(exact, labels))
    assert found["spearman"] == pytest.approx(pearson(ranks(exact), ranks(labels)))


def test_a_monotone_function_has_rank_correlation_one():
    found = classification.regression(np.exp(np.arange(8.0)), np.arange(8.0))
    assert found["spearman"] == pytest.approx(1.0) and found["pearson"] < 0.9


@pytest.mark.parametrize("size", [1, 3])
def test_correlations_with_a_constant_are_zero(size):
    constant, other = np.full(size, 0.1), np.arange(size) / 3
    for a, b in ((constant, other), (other, constant), (constant, constant)):
        found = classification.regression(a, b)
        assert found["pearson"] == found["spearman"] == 0.0
        assert found["loss"] == pytest.approx(((a - b) ** 2).mean())
