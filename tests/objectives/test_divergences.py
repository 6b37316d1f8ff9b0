"""Every divergence that is discovered, value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax.errors import UserError
from kd_jax.objectives import vocab
from kd_jax.objectives.divergence import Columns, Divergence, Rows, Softmax
from kd_jax.precision import policy_for
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


def test_sums_over_a_large_vocabulary_are_exact():
    """Several at once: number by number, they would be wrong by 1e-5 and more."""
    draw = np.random.default_rng(0).uniform
    arrays = {name: draw(1, 2, (2, 50_257)).astype(np.float32) for name in "ab"}
    sums = jax.jit(lambda arrays: Columns().reduced(arrays, jax.lax.add))(arrays)
    for name, array_CV in arrays.items():
        wanted = array_CV.sum(axis=1, dtype=np.float64)
        np.testing.assert_allclose(np.float64(sums[name][:, 0]), wanted, rtol=2e-7)


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


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_identical_heads_teach_nothing(precision):
    """Through the products of the engine: the teacher's head is the student's."""
    policy = policy_for(precision, "cpu")
    draw = np.random.default_rng(0).normal
    features_ND, unembed_VD = (
        jnp.asarray(draw(size=s), policy.activation) for s in ((7, 16), (50, 16))
    )
    terms = tuple(vocab.RowTerm(name, DIVERGENCES[name]()) for name in OF_TEACHER)
    engine = vocab.Engine(terms, policy, policy, chunk=3)

    @jax.jit
    def both(features_ND, unembed_VD, scales):
        def loss(student):
            weights = {term.name: jnp.ones(7) for term in terms}
            labels_N = jnp.zeros(7, jnp.int32)
            teacher = vocab.Head(features_ND, unembed_VD, None)
            return vocab.vocab_loss(engine, student, teacher, labels_N, weights, scales, {})[0]

        return jax.value_and_grad(loss)(vocab.Head(features_ND, unembed_VD, None))

    for name in OF_TEACHER:
        scales = {term.name: jnp.float32(term.name == name) for term in terms}
        value, grads = both(features_ND, unembed_VD, scales)
        assert abs(value) <= 1e-6, name
        for grad in (grads.features_ND, grads.unembed_VD):
            assert np.abs(grad).max() <= 1e-6, name


def test_far_logits_stay_finite():
    """Of one model, of both, and of both in opposite directions."""
    student, teacher, labels = logits()
    far = 1e4 * np.sign(student)
    divergences, temperatures = [make() for make in DIVERGENCES.values()], [1.0] * len(DIVERGENCES)
    for ours, theirs in ((far, teacher), (student, far), (far, far), (far, -far)):
        values, grads = value_and_grad(divergences, temperatures, ours, theirs, labels)
        for name, value, grad in zip(DIVERGENCES, values, grads, strict=True):
            assert np.isfinite(value).all() and np.isfinite(grad).all(), name


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


LIMITS = {  # (a divergence, another, how far they are apart relative to its size)
    "skl": (dict(alpha=1e-4), "kl", {}, 1e-3),
    "skl of nothing": (dict(alpha=0.0), "kl", {}, 1e-7),
    "srkl": (dict(alpha=1e-4), "reverse_kl", {}, 2e-3),
    "srkl of nothing": (dict(alpha=0.0), "reverse_kl", {}, 1e-7),
    "symmetric_kl": (dict(forward=1.0), "kl", {}, 1e-7),
    "symmetric_kl backwards": (dict(forward=0.0), "reverse_kl", {}, 1e-7),
    "akl": (dict(head=1.0), "kl", {}, 1e-5),
}


@pytest.mark.parametrize("case", LIMITS)
def test_limits(case):
    settings, other, others, error = LIMITS[case]
    student, teacher, labels = logits(size=0.5)
    divergences = [DIVERGENCES[case.split()[0]](**settings), DIVERGENCES[other](**others)]
    values, grads = value_and_grad(divergences, [2.0] * 2, student, teacher, labels)
    np.testing.assert_allclose(values[0], values[1], rtol=error)
    np.testing.assert_allclose(grads[0], grads[1], atol=error * np.abs(grads[1]).max())
    if "of" not in case and error > 1e-5:
        assert np.abs(values[0] - values[1]).max() > 1e-6  # the formula itself, not its limit


def test_sums_of_halves():
    """Symmetric KL is half of both KLs, and the published jsd the weighted sum of both skews."""
    student, teacher, labels = logits()
    beta = 0.3
    names = ("symmetric_kl", {}), ("kl", {}), ("reverse_kl", {})
    names += ("jsd", dict(beta=beta, scaled=False)), ("skl", dict(alpha=beta))
    names += (("srkl", dict(alpha=1 - beta)),)
    divergences = [DIVERGENCES[name](**settings) for name, settings in names]
    temperatures = [1.0] * len(names)
    for found in value_and_grad(divergences, temperatures, student, teacher, labels):
        symmetric, forward, reverse, jsd, skew, skew_reverse = found
        np.testing.assert_allclose(symmetric, (forward + reverse) / 2, rtol=1e-6, atol=1e-6)
        sum_of_skews = beta * skew + (1 - beta) * skew_reverse
        np.testing.assert_allclose(jsd, sum_of_skews, rtol=1e-5, atol=1e-6)


def test_the_head_of_a_teacher():
    """Ids of equal probability stay together, and the first choice is always there."""
    probs_CV = np.array([[0.4, 0.1, 0.3, 0.2], [0.6, 0.2, 0.1, 0.1], [0.25] * 4], np.float32)
    logits_CV = jnp.log(probs_CV)
    teacher = Softmax("teacher", logits_CV, logits_CV.max(1, keepdims=True), frozenset())
    sums = {key: x.sum(1, keepdims=True) for key, x in teacher.normalizer(1.0).items()}
    for mass, wanted in (
        (0.5, [[1, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]),
        (0.75, [[1, 0, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]]),
        (0.85, [[1, 0, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]]),
    ):
        np.testing.assert_array_equal(teacher.likeliest(mass, 1.0, sums), wanted, err_msg=str(mass))


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
