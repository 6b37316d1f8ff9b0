"""Mixtures of a student with others, and logits that are not a head's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, logsumexp

from kd_jax.objectives import logits as logits_module
from kd_jax.objectives import vocab
from kd_jax.objectives.logits import Drawn, Head, Members, Others, Sparse, sparse
from tests.objectives import naive
from tests.objectives.rows import DIVERGENCES, FP32, OF_TEACHER

N, V, E, D = 11, 13, 3, 5
SPACES = ("logits", "probabilities")


largest = jax.jit(sparse, static_argnums=1)


@jax.jit
def whole_logits(source):
    return source.logits(source.rows, FP32)


def draw(*shape, seed=0):
    return np.random.default_rng((seed, *shape)).normal(size=shape).astype(np.float32)


def members(space="logits", weights=(0.5, 0.2, 0.3)):
    heads = Head(draw(E, N, D), draw(E, V, D), draw(E, V))
    return Members(heads, np.array(weights, np.float32), space=space)


def logits_of(found):
    """Of each member, (E, N, V), in float64."""
    x, w = (np.asarray(a, np.float64) for a in (found.heads.features_ND, found.heads.unembed_VD))
    return np.einsum("end,evd->env", x, w) + np.asarray(found.heads.bias_V)[:, None]


def mean(logits_ENV, weights_E, space):
    weights = np.asarray(weights_E, np.float64)[:, None, None]
    if space == "logits":
        return (weights * logits_ENV).sum(0)
    return logsumexp(log_softmax(logits_ENV, -1), axis=0, b=weights)


@pytest.mark.parametrize("space", SPACES)
def test_members_give_the_mean(space):
    found = members(space)
    wanted = mean(logits_of(found), found.weights_E, space)
    np.testing.assert_allclose(whole_logits(found), wanted, rtol=1e-5, atol=1e-5)
    if space == "logits":
        cut = whole_logits(found.cut(7))
        np.testing.assert_allclose(cut, wanted[:, :7], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("space", SPACES)
def test_a_member_of_no_weight_is_not_there(space):
    found = members(space, weights=(0.0, 0.4, 0.6))
    wanted = mean(logits_of(found)[1:], found.weights_E[1:], space)
    np.testing.assert_allclose(whole_logits(found), wanted, rtol=1e-5, atol=1e-5)


def arguments(terms, others):
    labels = np.random.default_rng(1).integers(0, V, N).astype(np.int32)
    return dict(
        student=Head(draw(N, 4), draw(V, 4), draw(V)),
        teacher=Head(draw(N, 6), 2 * draw(V, 6), None),
        labels_N=labels,
        weights={term.name: np.abs(draw(N, seed=2)) for term in terms},
        scales={term.name: np.float32(1.0) for term in terms},
        temperatures={},
        others=others,
    )


@functools.partial(jax.jit, static_argnums=0)
def loss_and_grads(engine, given):
    def loss(student):
        return vocab.vocab_loss(engine, **{**given, "student": student})

    return jax.value_and_grad(loss, has_aux=True)(given["student"])


def at(heads):
    return [np.asarray(h.features_ND @ h.unembed_VD.T, np.float64) for h in heads]


def check(name, space, chunk, others):
    """Value and gradient against the definitions, in float64."""
    term = vocab.RowTerm(name, DIVERGENCES[name](), 2.0 if name == "kl" else 1.0)
    given = arguments((term,), others)
    engine = vocab.Engine((term,), FP32, FP32, chunk)
    (loss, _), found = loss_and_grads(engine, given)
    own, teacher = at((given["student"], given["teacher"]))
    bias = np.asarray(given["student"].bias_V, np.float64)
    share, source = float(others.share), others.source
    others_NV = np.asarray(whole_logits(source), np.float64)

    def mixture(own_NV):
        return mean(np.stack([own_NV, others_NV]), (share, 1 - share), space)

    constants = naive.constants(name, mixture(own + bias), term.temperature)

    def total(own_NV):
        args = mixture(own_NV), teacher, given["labels_N"], term.temperature
        values = naive.value(name, *args, **constants)
        return (given["weights"][name] * values).sum()

    assert loss == pytest.approx(total(own + bias), rel=1e-4)
    slope, step = np.zeros((N, V)), 1e-5
    for n in range(N):
        for v in range(V):
            nudge = np.zeros((N, V))
            nudge[n, v] = step
            slope[n, v] = (total(own + bias + nudge) - total(own + bias - nudge)) / (2 * step)
    atol = 2e-4 * np.abs(slope).max()
    np.testing.assert_allclose(found.bias_V, slope.sum(0), rtol=1e-3, atol=N * atol)
    wanted = slope @ np.asarray(given["student"].unembed_VD, np.float64)
    np.testing.assert_allclose(found.features_ND, wanted, rtol=1e-3, atol=5 * atol)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("name", [n for n in OF_TEACHER if not DIVERGENCES[n]().of_written])
def test_the_teacher_is_compared_with_the_mixture(name, space):
    check(name, space, 4, Others(members(space), jnp.float32(0.25), space))


def test_the_first_student_is_alone():
    term = vocab.RowTerm("kl", DIVERGENCES["kl"](), 1.0)
    engine = vocab.Engine((term,), FP32, FP32)
    alone = loss_and_grads(engine, arguments((term,), None))
    for space in SPACES:
        others = Others(members(space), jnp.float32(1.0), space)
        found = loss_and_grads(engine, arguments((term,), others))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, alone
        )


def test_labels_are_the_student_s_own_business():
    terms = tuple(vocab.RowTerm(name, DIVERGENCES[name]()) for name in ("ce", "kl"))
    others = Others(members(), jnp.float32(0.25))
    engine = vocab.Engine(terms, FP32, FP32)
    mixed, alone = (loss_and_grads(engine, arguments(terms, b)) for b in (others, None))
    assert mixed[0][1]["ce"] == pytest.approx(float(alone[0][1]["ce"]), rel=1e-6)
    assert mixed[0][1]["kl"] != pytest.approx(float(alone[0][1]["kl"]), rel=1e-2)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_the_gradient_shrinks_with_the_ensemble(n):
    """Where the mean is the same, its gradient by one of n + 1 students is 1 / (n + 1) of it."""
    term = vocab.RowTerm("kl", DIVERGENCES["kl"](), 1.0)
    engine = vocab.Engine((term,), FP32, FP32)
    given = arguments((term,), None)
    student = given["student"]
    same = Head(student.logits(student.rows, FP32), None, None)
    _, whole = loss_and_grads(engine, given)
    _, part = loss_and_grads(engine, given | {"others": Others(same, jnp.float32(1 / (n + 1)))})
    np.testing.assert_allclose(
        part.unembed_VD, np.asarray(whole.unembed_VD) / (n + 1), rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize("k", [1, 4, V - 1, V])
def test_sparse_logits_keep_the_mass(k):
    logits = 3 * draw(N, V) + 40
    found = largest(logits, k)
    whole = np.asarray(whole_logits(found))
    logs = log_softmax(logits.astype(np.float64), axis=1)
    np.testing.assert_allclose(np.exp(whole).sum(1), 1.0, rtol=1e-5)
    for n in range(N):
        kept = np.argsort(-logs[n])[:k]
        np.testing.assert_allclose(whole[n, kept], logs[n, kept], rtol=1e-4, atol=1e-5)
        others = np.delete(whole[n], kept)
        assert len(set(others)) <= 1
    if k >= V - 1:
        np.testing.assert_allclose(whole, logs, rtol=1e-4, atol=1e-4)


def test_sparse_others_and_a_sparse_teacher():
    """As if their logits were given whole."""
    others = largest(draw(N, V), 3)
    teacher = largest(2 * draw(N, V, seed=5), 4)
    term = vocab.RowTerm("kl", DIVERGENCES["kl"](), 1.0)
    engine = vocab.Engine((term,), FP32, FP32, chunk=4)

    def run(others, teacher):
        given = arguments((term,), Others(others, jnp.float32(0.5)))
        return loss_and_grads(engine, given | {"teacher": teacher})

    def whole(source: Sparse):
        return Head(whole_logits(source), None, None)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        run(others, teacher),
        run(whole(others), whole(teacher)),
    )


@pytest.mark.parametrize("name", list(DIVERGENCES))
def test_a_term_about_the_student_and_one_about_the_mixture(name):
    """Side by side they are what each is alone."""
    others = Others(members(), jnp.float32(0.25))
    pair = [vocab.RowTerm(of, DIVERGENCES[name](), 1.0, of) for of in ("student", "mixture")]

    def totals(terms):
        engine = vocab.Engine(tuple(terms), FP32, FP32)
        return loss_and_grads(engine, arguments(terms, others))[0][1]

    both = totals(pair)
    assert both["student"] != pytest.approx(float(both["mixture"]), rel=1e-3)
    for term in pair:
        assert both[term.name] == pytest.approx(float(totals([term])[term.name]), rel=1e-6)


def kept_and_student(k=4):
    """The teacher's k largest logits, its probabilities (N, V), and the student's logits."""
    logits_NV = 2 * draw(N, V, seed=5)
    return largest(logits_NV, k), naive.softmax(np.float64(logits_NV), 1.0), draw(N, V)


def forward_kl(source, student_NV):
    """Values (N,) and gradients (N, V) with respect to the student's logits, in two chunks."""
    values = [weighted_kl(source, student_NV, one_N)[0] for one_N in np.eye(N, dtype=np.float32)]
    slopes = weighted_kl(source, student_NV, np.ones(N, np.float32))[1]
    return np.array(values), np.asarray(slopes)


@jax.jit
def weighted_kl(source, student_NV, weights_N):
    term = vocab.RowTerm("kl", DIVERGENCES["kl"]())
    engine = vocab.Engine((term,), FP32, FP32, 6)

    def loss(student_NV):
        student, labels_N = Head(student_NV, None, None), jnp.zeros(N, jnp.int32)
        given = student, source, labels_N, {"kl": weights_N}, {"kl": jnp.float32(1.0)}, {}
        return vocab.vocab_loss(engine, *given)[0]

    return jax.value_and_grad(loss)(student_NV)


def of_largest(found, probs_NV, student_NV):
    """(q, p) of the K kept ids, and of all others together, (N, K + 1)."""
    both = []
    for each in (probs_NV, naive.softmax(np.float64(student_NV), 1.0)):
        kept_NK = np.take_along_axis(each, np.asarray(found.ids_NK), 1)
        both.append(np.concatenate([kept_NK, 1 - kept_NK.sum(1, keepdims=True)], 1))
    return both


def tail_kl(tail, found, probs_NV, student_NV):
    """KL(teacher || student) of each row by the definition of each treatment of the tail."""
    q, p = of_largest(found, probs_NV, student_NV)
    if tail == "bucket":
        return (q * np.log(q / p)).sum(1)
    kept = q[:, :-1]
    if tail == "renormalised":
        kept = kept / kept.sum(1, keepdims=True)
        return (kept * np.log(kept / p[:, :-1])).sum(1)
    dense = np.repeat(q[:, -1:] / (V - kept.shape[1]), V, 1)
    np.put_along_axis(dense, np.asarray(found.ids_NK), kept, 1)
    own = naive.softmax(np.float64(student_NV), 1.0)
    return (dense * np.log(dense / own)).sum(1)


@pytest.mark.parametrize("tail", ["uniform", "bucket", "renormalised"])
def test_tails_of_the_largest_logits(tail):
    found, probs_NV, student_NV = kept_and_student()
    values, slopes = forward_kl(found.replace(tail=tail), student_NV)
    np.testing.assert_allclose(values, tail_kl(tail, found, probs_NV, student_NV), rtol=1e-5)
    for v in range(V):
        nudge = 1e-5 * np.eye(V)[v]
        above, below = (
            tail_kl(tail, found, probs_NV, np.float64(student_NV) + sign * nudge)
            for sign in (1, -1)
        )
        np.testing.assert_allclose(slopes[:, v], (above - below) / 2e-5, atol=1e-5)


drawn = jax.jit(logits_module.draw, static_argnums=1)


def test_draws_have_the_gradient_of_all_logits_in_the_mean():
    """RS-KD; and each draw is of the teacher's distribution, whatever the other rows are."""
    logits_NV, student_NV, count = draw(N, V, seed=5), draw(N, V), 2000
    seeds = np.arange(N * 8, dtype=np.uint32).reshape(8, N)
    draws = jax.jit(jax.vmap(logits_module.draw, in_axes=(None, None, 0)), static_argnums=1)
    ids = np.asarray(draws(logits_NV, count, seeds))
    _, exact = forward_kl(Head(jnp.asarray(logits_NV), None, None), student_NV)
    ones_N = np.ones(N, np.float32)
    found = np.stack([weighted_kl(Drawn(each, V), student_NV, ones_N)[1] for each in ids])
    probs_NV = naive.softmax(np.float64(logits_NV), 1.0)
    error = np.sqrt(probs_NV * (1 - probs_NV) / (count * 8))
    assert np.abs((found.mean(0) - exact) / error).max() < 4.5
    # As far from it as independent draws are, not nearer.
    assert 0.8 < np.sqrt(np.mean(((found.mean(0) - exact) / error) ** 2)) < 1.2
    alone = drawn(logits_NV[3:4], count, seeds[0, 3:4])
    np.testing.assert_array_equal(alone[0], ids[0, 3])


def test_draws_of_no_numbers_are_marked():
    logits_NV = draw(N, V).copy()
    logits_NV[2, 5] = np.nan
    ids = np.asarray(drawn(logits_NV, 9, np.arange(N, dtype=np.uint32)))
    assert (ids[2] == -1).all() and (np.delete(ids, 2, 0) >= 0).all()
