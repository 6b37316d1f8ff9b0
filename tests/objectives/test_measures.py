import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax.objectives import measures, vocab
from tests.objectives import naive
from tests.objectives.rows import FP32, head


def test_accuracy_agreement_and_kl():
    student = np.array([[5, 0, 1], [0, 5, 1], [0, 1, 5], [5, 4, 3]], np.float32)
    teacher = np.array([[1, 0, 9], [0, 2, 1], [0, 1, 9], [5, 4, 3]], np.float32)
    labels = jnp.array([0, 1, 1, 2])
    weights = jnp.array([1.0, 0.5, 2.0, 0.0])
    terms = (
        vocab.RowTerm("accuracy", measures.Accuracy()),
        vocab.RowTerm("agreement", measures.Agreement()),
        measures.KL_T1,
    )
    _, totals = vocab.vocab_loss(
        vocab.Engine(terms, FP32, FP32),
        head(student),
        head(teacher),
        labels,
        {term.name: weights for term in terms},
        {},
        {},
    )
    assert totals["accuracy"] == 1.5  # rows 0 and 1
    assert totals["agreement"] == 2.5  # rows 1 and 2
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (student, teacher))
    kl = (q * np.log(q / p)).sum(-1)
    np.testing.assert_allclose(totals["kl_t1"], (kl * np.asarray(weights)).sum(), rtol=1e-5)


def test_entropy():
    rng = np.random.default_rng(0)
    student = np.concatenate([np.zeros((1, 8)), 3 * rng.normal(size=(4, 8)) + 40]).astype(
        np.float32
    )
    student[4, 0] = 1e4  # certain
    engine = vocab.Engine((measures.ENTROPY,), FP32, None)
    weights = jnp.array([1.0, 0.5, 2.0, 0.0, 1.0])
    _, totals = vocab.vocab_loss(
        engine, head(student), None, jnp.zeros(5, jnp.int32), {"entropy": weights}, {}, {}
    )
    p = naive.softmax(student.astype(np.float64), 1.0)
    entropy = -(p * np.log(np.maximum(p, 1e-300))).sum(-1)
    np.testing.assert_allclose(totals["entropy"], (entropy * np.asarray(weights)).sum(), rtol=1e-5)


def test_expected_calibration_error():
    """Against bins filled one token after the other."""
    rng = np.random.default_rng(0)
    logits_NV = rng.normal(size=(400, 7)).astype(np.float32) * rng.uniform(0, 4, (400, 1))
    logits_NV, labels_N = logits_NV.astype(np.float32), rng.integers(0, 7, 400).astype(np.int32)
    engine = vocab.Engine(measures.CALIBRATION, FP32, None)
    weights = {term.name: np.ones(400, np.float32) for term in measures.CALIBRATION}
    student = vocab.Head(logits_NV, None, None)
    totals = jax.jit(
        lambda student: vocab.vocab_loss(engine, student, None, labels_N, weights, {}, {})[1]
    )(student)
    means = {name: float(total) / 400 for name, total in totals.items()}
    sure_NV = naive.softmax(np.float64(logits_NV), 1.0)
    bins = [[] for _ in range(15)]
    for probs_V, label in zip(sure_NV, labels_N, strict=True):
        bins[min(int(probs_V.max() * 15), 14)].append((probs_V.argmax() == label, probs_V.max()))
    wanted = sum(abs(sum(r for r, _ in each) - sum(p for _, p in each)) for each in bins) / 400
    found = measures.expected_calibration_error({"loss": 1.0} | means)
    assert found == {"loss": 1.0, "ece": pytest.approx(wanted, rel=1e-4)} and wanted > 0.1
