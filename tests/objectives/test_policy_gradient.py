import jax
import jax.numpy as jnp
import numpy as np

from kd_jax.objectives import vocab
from kd_jax.objectives.policy_gradient import PolicyGradient
from kd_jax.objectives.reverse_kl import ReverseKL
from tests.objectives import naive
from tests.objectives.rows import FP32, head, logits


def of_labels(student, teacher, labels, written, divergence):
    """(values, gradients) of each row, whose word had the log-probability `written`."""
    engine = vocab.Engine((vocab.RowTerm("it", divergence),), FP32, FP32)

    def row(student_V, teacher_V, label, old):
        given = head(student_V[None]), head(teacher_V[None]), label[None]
        old = None if written is None else old[None]
        ones, scales = {"it": jnp.ones(1)}, {"it": jnp.float32(1.0)}
        return vocab.vocab_loss(engine, *given, ones, scales, {}, written_N=old)[0]

    old = jnp.zeros(len(labels)) if written is None else written
    return jax.jit(jax.vmap(jax.value_and_grad(row)))(student, teacher, labels, old)


def test_importance_ratio_of_words_that_an_earlier_model_wrote():
    student, teacher, labels = logits()
    earlier = np.random.default_rng(5).uniform(-3, -0.1, len(labels)).astype(np.float32)
    values, grads = of_labels(student, teacher, labels, earlier, PolicyGradient())
    args = ("policy_gradient", *(x.astype(np.float64) for x in (student, teacher)), labels, 1.0)
    np.testing.assert_allclose(values, naive.value(*args, old=earlier), rtol=1e-4, atol=1e-6)
    slope = naive.grad(*args, old=earlier)
    np.testing.assert_allclose(grads, slope, rtol=1e-4, atol=1e-6 * np.abs(slope).max())


def test_its_mean_over_what_the_student_writes_is_reverse_kl():
    student, teacher = np.random.default_rng(1).normal(size=(2, 1, 7)).astype(np.float32)
    every = np.arange(7, dtype=np.int32)
    both = (np.repeat(x, 7, axis=0) for x in (student, teacher))
    values, grads = of_labels(*both, every, None, PolicyGradient())
    p = naive.softmax(student.astype(np.float64), 1.0)[0]
    wanted, slope = of_labels(student, teacher, every[:1], None, ReverseKL())
    np.testing.assert_allclose(p @ np.asarray(values), wanted[0], rtol=1e-5)
    np.testing.assert_allclose(p @ np.asarray(grads), slope[0], rtol=1e-4, atol=1e-6)
