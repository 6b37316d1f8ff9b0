import numpy as np
import pytest

from kd_jax.evals import classification

NAMES = ("accuracy", "f1", "macro_f1", "matthews_correlation")


def counted(predictions, labels, c):
    """(precision, recall, F1) of one class, by counting."""
    hit = sum(p == y == c for p, y in zip(predictions, labels, strict=True))
    said, true = predictions.count(c), labels.count(c)
    precision, recall = hit / said if said else 0.0, hit / true if true else 0.0
    return precision, recall, 2 * hit / (said + true) if said + true else 0.0


@pytest.mark.parametrize("seed", range(3))
def test_figures_are_those_of_counting(seed):
    rng = np.random.default_rng(seed)
    predictions, labels = rng.integers(0, 3, 40), rng.integers(0, 3, 40)
    found = classification.figures(predictions, labels, NAMES, 3)
    per_class = [counted(predictions.tolist(), labels.tolist(), c) for c in range(3)]
    assert found["accuracy"] == pytest.approx(np.mean(predictions == labels))
    assert found["f1"] == pytest.approx(per_class[1][2])
    assert found["macro_f1"] == pytest.approx(np.mean([f for _, _, f in per_class]))
    report = classification.by_class(predictions, labels, ("x", "y", "z"))
    for c, name in enumerate("xyz"):
        values = report["classes"][name]
        assert [values[k] for k in ("precision", "recall", "f1")] == pytest.approx(per_class[c])
        assert values["support"] == (labels == c).sum()
        row = [((labels == c) & (predictions == p)).sum() for p in range(3)]
        assert report["confusion"][c] == row


def test_matthews_correlation_of_two_classes_is_pearsons():
    rng = np.random.default_rng(4)
    a, b = rng.integers(0, 2, 50), rng.integers(0, 2, 50)
    found = classification.figures(a, b, ("matthews_correlation",), 2)
    assert found["matthews_correlation"] == pytest.approx(np.corrcoef(a, b)[0, 1])


def test_constant_predictions_and_missing_classes():
    zeros, labels = np.zeros(4, int), np.array([0, 0, 1, 1])
    found = classification.figures(zeros, labels, NAMES, 2)
    assert found == {
        "accuracy": 0.5,
        "f1": 0.0,
        "macro_f1": pytest.approx(1 / 3),
        "matthews_correlation": 0.0,
    }
    assert classification.figures(labels, zeros, NAMES, 2)["matthews_correlation"] == 0.0
    assert classification.figures(zeros, zeros, NAMES, 2)["matthews_correlation"] == 0.0
    report = classification.by_class(zeros, zeros, ("no", "yes"))
    assert report["classes"]["yes"] == {"precision": 0, "recall": 0, "f1": 0, "support": 0}
    assert report["confusion"] == [[4, 0], [0, 0]]


def test_cross_entropy_is_in_nats_and_does_not_overflow():
    logits = np.array([[0.0, np.log(3.0)], [1000.0, 0.0]], np.float32)
    assert classification.cross_entropy(logits[:1], np.array([1])) == pytest.approx(-np.log(0.75))
    assert classification.cross_entropy(logits, np.array([0, 1])) == pytest.approx(
        (np.log(4) + 1000) / 2
    )
