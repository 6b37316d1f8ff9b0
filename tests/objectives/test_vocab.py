"""The engine that runs every divergence over chunks of rows."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax.objectives import vocab
from kd_jax.objectives.logits import Others, sources_of
from kd_jax.precision import Policy, policy_for
from kd_jax.types import ModelOutput
from tests.objectives.rows import DIVERGENCES, FP32, head, logits

TERMS = tuple(
    vocab.RowTerm(f"{name}_{temperature}", make(), temperature)
    for name, make in DIVERGENCES.items()
    for temperature in ((1.0, 2.0, None) if name in ("kl", "jsd") else (1.0,))
)
FEW = tuple(term for term in TERMS if term.name in ("ce_1.0", "kl_2.0"))
N, V = 23, 17


def problem(rows: int = N, vocab_size: int = V, terms=TERMS) -> dict:
    """Arguments of `vocab_loss` but the engine."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jax.device_put(rng.normal(size=shape).astype(np.float32))

    return dict(
        student=vocab.Head(draw(rows, 6), draw(vocab_size, 6), draw(vocab_size)),
        teacher=vocab.Head(draw(rows, 9), draw(vocab_size, 9), None),
        labels_N=jnp.asarray(rng.integers(0, vocab_size, rows), jnp.int32),
        weights={term.name: jnp.abs(draw(rows)) for term in terms},
        scales={term.name: jnp.float32(rng.uniform(0.5, 2)) / rows for term in terms},
        temperatures={t.name: jnp.float32(3.0) for t in terms if t.temperature is None},
    )


@functools.partial(jax.jit, static_argnums=0)
def loss_and_grads(engine, given):
    """((loss, totals), gradients for the heads of student and teacher)."""
    rest = [given[name] for name in ("labels_N", "weights", "scales", "temperatures")]

    def loss(heads):
        return vocab.vocab_loss(engine, *heads, *rest)

    return jax.value_and_grad(loss, has_aux=True)((given["student"], given["teacher"]))


@pytest.fixture(scope="module")
def whole():
    return loss_and_grads(vocab.Engine(TERMS, FP32, FP32, chunk=N), problem())


@pytest.mark.parametrize("chunk", [1, 5, 100])
def test_chunks_change_nothing(whole, chunk):
    found = loss_and_grads(vocab.Engine(TERMS, FP32, FP32, chunk), problem())
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * np.abs(b).max()),
        found,
        whole,
    )


def test_loss_is_the_scaled_sum_of_the_totals(whole):
    (loss, totals), _ = whole
    scales = problem()["scales"]
    assert totals.keys() == scales.keys()
    np.testing.assert_allclose(loss, sum(scales[n] * totals[n] for n in totals), rtol=1e-6)


def test_gradient_is_that_of_whole_logits(whole):
    """Against autodiff through logits and the terms' values, without the engine."""
    given = problem()

    @jax.jit
    @jax.grad
    def naive(student):
        total = 0.0
        for term in TERMS:
            temperature = 3.0 if term.temperature is None else term.temperature
            student_logits, teacher_logits = (
                h.features_ND @ h.unembed_VD.T + (0.0 if h.bias_V is None else h.bias_V[None])
                for h in (student, given["teacher"])
            )
            rows = vocab.Rows(
                vocab.Softmax(
                    "student", student_logits, student_logits.max(1, keepdims=True), frozenset()
                ),
                vocab.Softmax(
                    "teacher", teacher_logits, teacher_logits.max(1, keepdims=True), frozenset()
                ),
                given["labels_N"],
            )
            sums = {
                key: array.sum(axis=1, keepdims=True)
                for key, array in term.divergence.sums(rows, temperature).items()
            }
            values = term.divergence.value(rows, sums, temperature)[:, 0]
            total += given["scales"][term.name] * (given["weights"][term.name] * values).sum()
        return total

    ours = whole[1][0]
    for field in ("features_ND", "unembed_VD", "bias_V"):
        wanted = np.asarray(getattr(naive(given["student"]), field))
        atol = 1e-6 * np.abs(wanted).max()
        np.testing.assert_allclose(getattr(ours, field), wanted, rtol=1e-5, atol=atol)


def test_the_teacher_gets_no_gradient(whole):
    for gradient in jax.tree.leaves(whole[1][1]):
        assert not np.asarray(gradient).any()


def test_terms_without_a_scale_are_measured_only():
    given = problem()
    trained = dict(given, scales={n: s for n, s in given["scales"].items() if n.startswith("kl")})
    (loss, totals), (ours, _) = loss_and_grads(vocab.Engine(TERMS, FP32, FP32), trained)
    assert totals.keys() == given["scales"].keys()
    kl_only = tuple(term for term in TERMS if term.name.startswith("kl"))
    (alone, _), (wanted, _) = loss_and_grads(vocab.Engine(kl_only, FP32, FP32), trained)
    np.testing.assert_allclose(loss, alone, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), ours, wanted)


def test_nothing_to_train():
    given = dict(problem(), scales={})
    (loss, totals), grads = loss_and_grads(vocab.Engine(TERMS, FP32, FP32), given)
    assert loss == 0.0 and len(totals) == len(TERMS)
    assert not any(np.asarray(gradient).any() for gradient in jax.tree.leaves(grads))


@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_rows_of_weight_0_may_hold_anything(whose):
    student, teacher, labels = logits(rows=5)
    terms = tuple(vocab.RowTerm(name, make()) for name, make in DIVERGENCES.items())
    counts = jnp.array([1, 1, 0, 1, 0], jnp.float32)
    engine = vocab.Engine(terms, FP32, FP32, chunk=2)
    given = dict(
        student=head(student).replace(unembed_VD=100.0 * jnp.eye(student.shape[1])),
        teacher=head(teacher).replace(unembed_VD=100.0 * jnp.eye(student.shape[1])),
        labels_N=jnp.asarray(labels),
        weights={term.name: counts for term in terms},
        scales={term.name: jnp.float32(1.0) for term in terms},
        temperatures={},
    )
    wanted = loss_and_grads(engine, given)
    for bad in (3e38, -3e38):  # times 100, the logits are infinite, and their differences no number
        features_ND = given[whose].features_ND.at[jnp.array([2, 4]), ::2].set(bad)
        spoilt = given | {whose: given[whose].replace(features_ND=features_ND)}
        jax.tree.map(np.testing.assert_array_equal, loss_and_grads(engine, spoilt), wanted)


def output(rng, vocab_size, width, bias) -> ModelOutput:
    draw = lambda *shape: jax.device_put(rng.normal(size=shape).astype(np.float32))  # noqa: E731
    return ModelOutput(
        draw(2, 3, width), draw(vocab_size, width), draw(vocab_size) if bias else None
    )


@pytest.mark.parametrize("sizes", [(12, 15), (15, 12)])
def test_what_compares_runs_over_the_shared_ids_and_all_else_over_its_own(sizes):
    rng, given = np.random.default_rng(0), problem(rows=6, vocab_size=12, terms=FEW)
    student, teacher = output(rng, sizes[0], 4, True), output(rng, sizes[1], 5, False)
    labels_N = given["labels_N"].at[0].set(sizes[0] - 1)  # one that the teacher may not have
    engine = vocab.Engine(FEW, FP32, FP32, chunk=4)
    rest = (labels_N, *(given[name] for name in ("weights", "scales", "temperatures")))

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def found(student):
        return vocab.vocab_loss(engine, *sources_of(student, teacher)[:2], *rest)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def wanted(student):
        logs = [out.logits.reshape(6, -1) for out in (student, teacher)]
        p, q = (jax.nn.log_softmax(each[:, :12] / 2.0) for each in logs)
        of_label_N1 = jnp.take_along_axis(jax.nn.log_softmax(logs[0]), labels_N[:, None], 1)
        rows = {"ce_1.0": -of_label_N1[:, 0], "kl_2.0": 4.0 * (jnp.exp(q) * (q - p)).sum(1)}
        totals = {name: given["weights"][name] @ value for name, value in rows.items()}
        return sum(given["scales"][name] * totals[name] for name in totals), totals

    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, found(student), wanted(student))
    grads = found(student)[1]
    assert sizes[0] == 12 or np.abs(np.asarray(grads.unembed_VD[12:])).min() > 0


@pytest.mark.parametrize("space", ["logits", "probabilities"])
@pytest.mark.parametrize("ids", [12, 15])
def test_a_mixture_over_more_ids_than_the_teacher_has(space, ids):
    rng, share = np.random.default_rng(0), jnp.float32(0.4)
    terms = (FEW[1], vocab.RowTerm("own", FEW[0].divergence, of="mixture"))
    given = problem(rows=6, vocab_size=12, terms=terms)
    draw = lambda *shape: jax.device_put(rng.normal(size=shape).astype(np.float32))  # noqa: E731
    heads = (vocab.Head(draw(6, 4), draw(size, 4), None) for size in (15, 12, ids))
    student, teacher, others = heads
    engine = vocab.Engine(terms, FP32, FP32)
    rest = tuple(given[name] for name in ("labels_N", "weights", "scales", "temperatures"))

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def found(student):
        return vocab.vocab_loss(engine, student, teacher, *rest, Others(others, share, space))

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def wanted(student):
        s, t, o = (each.logits(each.rows, FP32) for each in (student, teacher, others))
        s = s[:, :ids]
        if space == "probabilities":
            mean = share * jax.nn.softmax(s) + (1 - share) * jax.nn.softmax(o)
            mixture = jnp.log(mean)
        else:
            mixture = share * s + (1 - share) * o
        p, q = (jax.nn.log_softmax(each[:, :12] / 2.0) for each in (mixture, t))
        own = jax.nn.log_softmax(mixture)
        of_label_N1 = jnp.take_along_axis(own, given["labels_N"][:, None], 1)
        rows = {"kl_2.0": 4.0 * (jnp.exp(q) * (q - p)).sum(1), "own": -of_label_N1[:, 0]}
        totals = {name: given["weights"][name] @ value for name, value in rows.items()}
        return sum(given["scales"][name] * totals[name] for name in totals), totals

    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, found(student), wanted(student))


def test_features_and_unembedding_keep_their_types():
    given = problem(terms=FEW)
    given["student"] = jax.tree.map(lambda x: x.astype(jnp.bfloat16), given["student"])
    policy = Policy("bfloat16", "bfloat16")
    (loss, totals), (grads, _) = loss_and_grads(vocab.Engine(FEW, policy, policy), given)
    assert {x.dtype for x in jax.tree.leaves(grads)} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves((loss, totals))} == {jnp.dtype("float32")}


def largest_array(chunk: int, rows: int, vocab_size: int) -> int:
    """Elements of the largest array in the compiled gradient."""
    engine = vocab.Engine(FEW, FP32, FP32, chunk)
    lowered = loss_and_grads.lower(engine, problem(rows, vocab_size, FEW))
    shapes = re.findall(r"\b[a-z]+[0-9]+\[([0-9,]+)\]", lowered.compile().as_text())
    return max(int(np.prod([int(n) for n in shape.split(",")])) for shape in shapes)


def test_no_array_of_rows_times_vocabulary():
    rows, vocab_size = 96, 512
    assert largest_array(8, rows, vocab_size) <= 9 * vocab_size  # the teacher's unembedding
    assert largest_array(rows, rows, vocab_size) >= rows * vocab_size  # the test can see it


@pytest.mark.parametrize(
    ("chunk", "num_rows", "vocab_size", "rows"),
    [
        (100, 250, 10, 84),
        (64, 32, 10, 32),
        (0, 64, 30_000, 64),
        (0, 1024, 2**16, 512),
        (0, 9, 2**23, 5),
    ],
)
def test_rows_per_chunk(chunk, num_rows, vocab_size, rows):
    engine = vocab.Engine((), FP32, None, chunk)
    assert engine.rows_per_chunk(num_rows, vocab_size) == rows


@pytest.mark.parametrize(
    ("num_rows", "vocab_size", "rows"),
    [(2048, 151_936, 1024), (3000, 151_936, 1536), (2500, 50_257, 1280), (500, 151_936, 500)],
)
def test_chunks_on_accelerators_are_long_and_even(num_rows, vocab_size, rows):
    """At least 1,024 rows, unless there are fewer, in multiples of 128."""
    engine = vocab.Engine((), policy_for("bf16", "tpu"), None)
    assert engine.rows_per_chunk(num_rows, vocab_size) == rows


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_sums_go_block_by_block_on_a_cpu_alone(platform):
    """Elsewhere blocks of logits would be arrays of their own."""
    policy = policy_for("fp32", platform)
    given = problem(vocab_size=1000, terms=FEW)
    text = str(
        jax.make_jaxpr(loss_and_grads, static_argnums=0)(vocab.Engine(FEW, policy, policy), given)
    )
    assert (",16,64]" in text) == (platform == "cpu")
