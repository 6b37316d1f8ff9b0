"""What every term over vectors promises."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax.errors import UserError
from kd_jax.objectives.objective import build_objective
from kd_jax.types import ModelSpec
from tests.objectives import texts
from tests.objectives.rows import FP32, VECTOR_TERMS

SHARP = dict(t_squared=False, teacher_temperature=2.0)
CASES = {
    "embedding": ("embedding", {}),
    "embedding, cosine": ("embedding", dict(kind="cosine")),
    "embedding, cut": ("embedding", dict(dims=(6, 4, 2), dim_weights=(1.0, 0.5, 0.25))),
    "similarity": ("similarity", {}),
    "similarity, dot": ("similarity", dict(score="dot")),
    "similarity, cut": ("similarity", dict(dims=(6, 3), **SHARP)),
    "margin_mse": ("margin_mse", {}),
    "margin_mse, cosine": ("margin_mse", dict(score="cosine")),
    "contrastive": ("contrastive", {}),
    "contrastive, symmetric": ("contrastive", dict(symmetric=True, score="dot", dims=(6, 4))),
}
TERMS = {case: VECTOR_TERMS[name](**settings) for case, (name, settings) in CASES.items()}
OF_TEACHER = [case for case in CASES if TERMS[case].needs_teacher]
ROWS, WIDTH, REAL = texts.batch(8, 4), 6, 24  # rows, of which the last 8 fill the batch up
STUDENT, TEACHER = (texts.vectors(ROWS, WIDTH, seed) for seed in (1, 2))
SPEC = ModelSpec(WIDTH, 1, vector_width=WIDTH)
PARTS = "total", "slopes of parameters", "slopes", "weight"  # of what `run` finds
PARAMS = {name: term.init(jax.random.key(0), SPEC, SPEC) for name, term in TERMS.items()}


def test_every_term_has_a_case():
    assert {name for name, _ in CASES.values()} == set(VECTOR_TERMS)


@functools.partial(jax.jit, static_argnames="devices")
def run(student, teacher=TEACHER, rows=ROWS, devices=1):
    """All terms at once; `student`: that of all, or each one's."""
    student = student if isinstance(student, dict) else dict.fromkeys(TERMS, student)
    return texts.run(TERMS, PARAMS, student, teacher, rows, devices=devices)


@functools.cache
def reference():
    """Without what fills the batch up."""
    given = jax.device_get((STUDENT, TEACHER, ROWS))
    return run(*jax.tree.map(lambda x: x[:REAL], given))


def check_same(found):
    found = jax.device_get(found)
    for case, wanted in reference().items():
        for name, one, other in zip(PARTS, found[case], wanted, strict=True):
            if name == "slopes":
                assert one[:REAL].any() and not one[REAL:].any(), case
                one = one[:REAL]
            close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
            jax.tree.map(functools.partial(close, err_msg=f"{case}: {name}"), one, other)


@pytest.mark.parametrize("devices", [2, 8])
def test_same_on_several_devices(devices):
    check_same(run(STUDENT, devices=devices))


def test_what_fills_a_batch_up_is_left_out():
    """Whatever it holds, and wherever it stands."""
    junk = jnp.where(jnp.arange(8)[:, None, None] % 2, jnp.nan, 1e30)
    spoil = lambda out: out.replace(features=out.features.at[-8:].set(junk))  # noqa: E731
    rows = ROWS.replace(labels=ROWS.labels.at[-3:].set(7))
    check_same(run(spoil(STUDENT), spoil(TEACHER), rows))
    found = run(*jax.tree.map(lambda x: jnp.roll(x, 8, axis=0), (STUDENT, TEACHER, ROWS)))
    back = lambda own: (*own[:2], np.roll(own[2], -8, axis=0), own[3])  # noqa: E731
    check_same({case: back(own) for case, own in found.items()})


def test_weights_count_texts_examples_or_negatives():
    counts = {"embedding": 24, "similarity": 24, "margin_mse": 12, "contrastive": 6}
    for case, (_, _, _, weight) in reference().items():
        assert weight == counts[CASES[case][0]]


@pytest.mark.parametrize("case", [case for case in OF_TEACHER if not TERMS[case].dims])
def test_nothing_to_learn_from_oneself(case):
    total, _, slopes, _ = run(TEACHER)[case]
    np.testing.assert_allclose(total, 0.0, atol=1e-5)
    np.testing.assert_allclose(slopes, 0.0, atol=1e-5)


def test_gradient_is_that_of_the_value():
    """By central differences along each term's own gradient."""
    slopes = {name: slope for name, (_, _, slope, _) in reference().items()}
    squares = {name: np.sum(slope**2) for name, slope in slopes.items()}
    sizes = {name: 0.02 / np.sqrt(square) for name, square in squares.items()}

    def totals(sign):
        moved = {
            name: STUDENT.replace(
                features=STUDENT.features.at[:REAL].add(sign * sizes[name] * slope)
            )
            for name, slope in slopes.items()
        }
        return {name: found[0] for name, found in run(moved).items()}

    above, below = totals(1), totals(-1)
    for name, square in squares.items():
        slope = (above[name] - below[name]) / (2 * sizes[name])
        np.testing.assert_allclose(slope, square, rtol=5e-3, err_msg=name)


def test_a_cut_term_is_the_sum_of_its_sizes():
    term = TERMS["similarity, cut"]
    whole = VECTOR_TERMS["similarity"](**SHARP)
    cut = lambda size: STUDENT.replace(features=STUDENT.features[..., :size])  # noqa: E731
    parts = [texts.value(whole, cut(size), TEACHER, ROWS) for size in (6, 3)]
    assert texts.value(term, STUDENT, TEACHER, ROWS) == pytest.approx(sum(parts), rel=1e-5)
    weighted = VECTOR_TERMS["similarity"](**SHARP, dims=[6, 3], dim_weights=[0.5, 2])
    wanted = 0.5 * parts[0] + 2 * parts[1]
    assert texts.value(weighted, STUDENT, TEACHER, ROWS) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(dims=4), "dims=4: give a list of numbers"),
        (dict(dims=(4, 0)), "dims=0 must be at least 1"),
        (dict(dims=(4, 2), dim_weights=(1.0,)), "dim_weights has 1 numbers and dims 2"),
        (dict(dims=(8, 4)), r"dims=\(8, 4\): the student's vectors have 6 numbers"),
    ],
)
@pytest.mark.parametrize("name", VECTOR_TERMS)
def test_mistakes_in_dims(name, settings, message):
    with pytest.raises(UserError, match=f"objective {name}: {message}"):
        VECTOR_TERMS[name](**settings).init(jax.random.key(0), SPEC, SPEC)


@pytest.mark.parametrize("name", VECTOR_TERMS)
def test_terms_are_for_vectors_alone(name):
    settings = {name: {"weight": 1.0}}
    with pytest.raises(UserError, match=f"objective.{name} compares vectors of texts, and this"):
        build_objective(settings, 10, FP32, FP32)
    with pytest.raises(UserError, match=f"objective.{name} takes no positions"):
        build_objective({name: dict(weight=1.0, positions="all")}, 10, FP32, FP32, outputs="vector")
    if not VECTOR_TERMS[name]().has_temperature:
        with pytest.raises(UserError, match=f"objective.{name} takes no temperature"):
            own = {name: dict(weight=1.0, temperature=2.0)}
            build_objective(own, 10, FP32, FP32, outputs="vector")
    if VECTOR_TERMS[name]().needs_teacher:
        with pytest.raises(UserError, match=f"objective.{name} needs a teacher"):
            build_objective(settings, 10, FP32, None, outputs="vector")


@pytest.mark.parametrize("name", ["ce", "kl", "mse", "logit_mse"])
def test_vectors_are_no_logits(name):
    with pytest.raises(UserError, match=f"objective.{name} compares logits, and .* make vectors"):
        build_objective({name: {"weight": 1.0}}, 10, FP32, FP32, outputs="vector")


def test_an_objective_of_vectors():
    settings = {
        "hidden": {"weight": 1.0},
        "near": {"weight": 1.0, "term": "similarity", "temperature": 0.1},
        "embedding": {"weight": 1.0},
        "contrastive": {
            "weight": 1.0,
            "temperature": {"kind": "linear", "start": 0.1, "end": 0.02},
        },
    }
    objective, _, temperatures = build_objective(settings, 10, FP32, FP32, outputs="vector")
    assert objective.names == list(settings) and objective.measured == ()
    assert {name: at(10) for name, at in temperatures.items()} == pytest.approx(
        {"near": 0.1, "contrastive": 0.02}
    )
    assert objective.needs_teacher_states and objective.compares_rows
    apart, across = objective.parts()
    assert (apart.names, across.names) == (["hidden", "embedding"], ["near", "contrastive"])
    assert across.compares_rows and not apart.compares_rows
    del settings["hidden"]
    alone = build_objective(settings, 10, FP32, FP32, outputs="vector")[0]
    assert alone.needs_teacher and not alone.needs_teacher_states
    usual = build_objective({"contrastive": {"weight": 1.0}}, 10, FP32, None, outputs="vector")
    assert usual[2]["contrastive"](0) == 0.05 and not usual[0].needs_teacher
