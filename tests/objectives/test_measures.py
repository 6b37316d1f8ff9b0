import jax.numpy as jnp
import numpy as np

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
