import numpy as np
import pytest
from scipy import special

from kd_jax.metrics import classification
from kd_jax.metrics.classification import compare_with_teacher

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


def wanted(student_NC, teacher_NC):
    p, q = special.softmax(teacher_NC, -1), special.softmax(student_NC, -1)
    return {
        "kl": float(np.mean(special.rel_entr(p, q).sum(-1))),
        "agreement": float(np.mean(p.argmax(-1) == q.argmax(-1))),
    }


def test_one_answer_a_row():
    student, teacher = np.random.default_rng(0).normal(0, 2, (2, 30, 4))
    found = compare_with_teacher(list(student), list(teacher))
    assert found == pytest.approx(wanted(student, teacher))
    assert 0 < found["agreement"] < 1
    assert compare_with_teacher(list(student), list(student)) == {"kl": 0.0, "agreement": 1.0}


def test_answers_over_rows_of_different_lengths_count_alike():
    rng = np.random.default_rng(0)
    pairs = [rng.normal(0, 2, (2, 2, length)) for length in (3, 9, 5)]
    each = [wanted(student, teacher) for student, teacher in pairs]
    found = compare_with_teacher(*zip(*pairs, strict=True))
    for name in ("kl", "agreement"):
        assert found[name] == pytest.approx(np.mean([one[name] for one in each]))
