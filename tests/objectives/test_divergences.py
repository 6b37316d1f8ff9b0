"""Every divergence that is discovered, value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax.errors import UserError
from kd_jax.objectives.divergence import Divergence, Rows, Softmax
from tests.objectives import naive
from tests.objectives.rows import (
    DIVERGENCES,
    OF_TEACHER,
    cases,
    logits,
    value_and_grad,
)


def exact(*arrays):
    return [array.astype(np.float64) for array in arrays]


def test_every_divergence_has_a_definition_to_be_tested_against():
    assert sorted(DIVERGENCES) == naive.NAMES, "add the new one's formula to naive.py"


@pytest.mark.parametrize("name", DIVERGENCES)
def test_value_and_gradient(name):
    student, teacher, labels = logits()
    divergences = [DIVERGENCES[name](**settings) for settings, _ in cases(name)]
    temperatures = [t for _, t in cases(name)]
    values, grads = value_and_grad(divergences, temperatures, student, teacher, labels)
    for i, (settings, t) in enumerate(cases(name)):
        args = (name, *exact(student, teacher), labels, float(t))
        wanted, slope = naive.value(*args, **settings), naive.grad(*args, **settings)
        where = f"{settings} at temperature {t!r}"
        np.testing.assert_allclose(values[i], wanted, rtol=1e-5, atol=1e-6, err_msg=where)
        atol = 1e-6 * np.abs(slope).max()
        np.testing.assert_allclose(grads[i], slope, rtol=1e-5, atol=atol, err_msg=where)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_written_out_gradient_is_the_traced_one(name):
    student, teacher, labels = logits(seed=1, size=1.5)

    @jax.jit
    def both(student, teacher, labels):
        found = []
        for settings, t in cases(name):
            divergence = DIVERGENCES[name](**settings)
            # As if a term at T = 2 were there too: exponentials at T = 1 are its squares.
            powers = frozenset({2})
            ours, theirs = (
                Softmax(name, logits, logits.max(axis=1, keepdims=True), powers)
                for name, logits in (("student", student), ("teacher", teacher))
            )
            rows = Rows(ours, theirs, labels)
            sums = {
                key: jnp.sum(array, axis=1, keepdims=True)
                for key, array in divergence.sums(rows, t).items()
            }
            traced = Divergence.grad(divergence, rows, sums, t)
            found.append((divergence.grad(rows, sums, t), traced))
        return found

    found = both(student, teacher, labels)
    for (settings, t), (written, traced) in zip(cases(name), found, strict=True):
        np.testing.assert_allclose(
            written,
            traced,
            rtol=2e-5,
            atol=2e-6 * np.abs(traced).max(),
            err_msg=f"{settings} at temperature {t!r}",
        )


@pytest.mark.parametrize("name", OF_TEACHER)
def test_nothing_to_learn_from_oneself(name):
    same, _, labels = logits()
    divergences = [DIVERGENCES[name](**settings) for settings, _ in cases(name)]
    temperatures = [t for _, t in cases(name)]
    values, grads = value_and_grad(divergences, temperatures, same, same, labels)
    np.testing.assert_allclose(values, 0.0, atol=1e-6)
    np.testing.assert_allclose(grads, 0.0, atol=1e-6)


@pytest.mark.parametrize(("end", "limit"), [(0.0, "kl"), (1.0, "reverse_kl")])
def test_jsd_reaches_both_kls_without_a_jump(end, limit):
    # Mild logits: the larger the ratios of the two, the nearer to its end beta has to be.
    student, teacher, labels = logits(size=0.5)
    betas = [abs(end - distance) for distance in (1e-3, 1e-6, 0.0)]
    divergences = [DIVERGENCES[limit](), *(DIVERGENCES["jsd"](beta=beta) for beta in betas)]
    values, grads = value_and_grad(divergences, [2.0] * 4, student, teacher, labels)
    for i, distance in ((1, 1e-3), (2, 1e-6), (3, 0.0)):
        error = 10 * distance + 1e-5
        np.testing.assert_allclose(values[i], values[0], rtol=error)
        np.testing.assert_allclose(grads[i], grads[0], atol=error * np.abs(grads[0]).max())
    assert np.abs(values[1] - values[0]).max() > 1e-5  # the formula itself, not its limit


@pytest.mark.parametrize(("case", "error"), [("apart", 1e-5), ("far", 1e-5), ("near", 1e-4)])
def test_jsd_at_every_beta(case, error):
    """From ratios of e^100 and more between the two ("far") to ones of 1.01 ("near")."""
    student, teacher, labels = logits(size=12.0 if case == "far" else 1.0)
    if case == "near":
        student = teacher + 0.01 * student
    betas = [1e-6, 1e-3, 0.5, 1 - 1e-3, 1 - 1e-6]
    divergences = [DIVERGENCES["jsd"](beta=beta) for beta in betas]
    values, grads = value_and_grad(divergences, [1.0] * 5, student, teacher, labels)
    for i, beta in enumerate(betas):
        args = ("jsd", *exact(student, teacher), labels, 1.0)
        wanted, slope = naive.value(*args, beta=beta), naive.grad(*args, beta=beta, step=3e-4)
        # Between models so near, probabilities that float32 rounds are told apart.
        value_atol, grad_atol = (1e-10, 1e-6) if case == "near" else (0.0, 0.0)
        np.testing.assert_allclose(
            values[i], wanted, rtol=error, atol=value_atol, err_msg=str(beta)
        )
        atol = grad_atol + error * np.abs(slope).max()
        np.testing.assert_allclose(grads[i], slope, rtol=error, atol=atol, err_msg=str(beta))


def test_jsd_refuses_other_betas():
    for beta, message in (
        (-0.1, "at least 0 and at most 1"),
        (1.1, "at least 0 and at most 1"),
        (float("nan"), "finite"),
    ):
        with pytest.raises(UserError, match=f"beta=.* must be {message}"):
            DIVERGENCES["jsd"](beta=beta)
