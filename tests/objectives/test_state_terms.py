"""What every term over hidden states and attention promises."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.objectives.outputs import LENGTH, ROWS, batch, output
from tests.objectives.rows import STATE_TERMS

CASES = {
    "hidden": ("hidden", {}),
    "attention": ("attention", {}),
    "attention kl": ("attention", {"kind": "kl"}),
    "attention kl, means, causal": ("attention", dict(kind="kl", heads="mean", causal=True)),
    "attention, causal": ("attention", {"causal": True}),
    "relation": ("relation", {}),
    "relation MiniLM": ("relation", {"relations": ("qk", "vv"), "layers": "uniform"}),
    "relation heads": ("relation", {"relation_heads": 4}),
    "pkd": ("pkd", {}),
}
ROWS_OF = jax.device_get(batch())
STUDENT, TEACHER = (
    jax.device_get(output(ROWS_OF, n, 12, seed, heads=2)) for n, seed in ((2, 1), (4, 2))
)


def test_every_term_has_a_case():
    assert {name for name, _ in CASES.values()} == set(STATE_TERMS)


def value_and_grad(*args):
    return jax.device_get(compiled(*args))


@functools.partial(jax.jit, static_argnums=0)
def compiled(case, student, teacher, rows):
    name, settings = CASES[case]
    term = STATE_TERMS[name](**settings)
    run = jax.value_and_grad(lambda out: term.total({}, out, teacher, rows))
    return *run(student), jnp.sum(term.weights(rows))


def states(out):
    return {"hidden": out.hidden, "attention": out.attention}


def mapped(function, out):
    return out.replace(**jax.tree.map(function, states(out)))


def check(found, wanted):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, wanted)


@pytest.mark.parametrize("case", CASES)
def test_padding_is_left_out(case):
    """Whatever it holds, more columns of it and rows that are nothing else."""
    wanted, slopes, weight = value_and_grad(case, STUDENT, TEACHER, ROWS_OF)
    rng = np.random.default_rng(0)

    def pad(array, columns):
        size = [(0, 2), (0, columns)] + [(0, 0)] * (array.ndim - 2)
        return np.pad(array, size)

    for columns in (0, 3):
        rows = ROWS_OF.replace(mask_BT=pad(ROWS_OF.mask_BT, columns))

        def spoil(array, mask_BT=rows.mask_BT, columns=columns):
            wide = pad(array, columns)
            padding = np.expand_dims(mask_BT == 0, tuple(range(2, wide.ndim)))
            return np.where(padding, np.float32(1e3 * rng.normal(size=wide.shape)), wide)

        student, teacher = mapped(spoil, STUDENT), mapped(spoil, TEACHER)
        found, spoilt, more = value_and_grad(case, student, teacher, rows)
        np.testing.assert_allclose(found, wanted, rtol=1e-5)
        assert more == weight
        for slope, clean in zip(
            *(jax.tree.leaves(states(x)) for x in (spoilt, slopes)), strict=True
        ):
            np.testing.assert_allclose(slope[:ROWS, :LENGTH], clean, rtol=1e-4, atol=1e-6)
            assert not slope[ROWS:].any() and not slope[:, LENGTH:].any()
            assert not slope[1, 3:].any()


@pytest.mark.parametrize("case", CASES)
def test_a_batch_is_the_sum_of_its_parts(case):
    wanted, slopes, weight = value_and_grad(case, STUDENT, TEACHER, ROWS_OF)
    parts = []
    for rows in (slice(0, 2), slice(2, 4)):
        cut = functools.partial(jax.tree.map, lambda x, rows=rows: x[rows])
        some = ROWS_OF.replace(mask_BT=ROWS_OF.mask_BT[rows])
        parts.append(value_and_grad(case, mapped(cut, STUDENT), mapped(cut, TEACHER), some))
    np.testing.assert_allclose(parts[0][0] + parts[1][0], wanted, rtol=1e-5)
    assert parts[0][2] + parts[1][2] == weight > 0
    both = jax.tree.map(lambda *x: np.concatenate(x), *(states(slope) for _, slope, _ in parts))
    check(both, states(slopes))


@pytest.mark.parametrize("case", CASES)
def test_nothing_to_learn_from_oneself(case):
    total, slopes, _ = value_and_grad(case, STUDENT, STUDENT, ROWS_OF)
    np.testing.assert_allclose(total, 0.0, atol=1e-5)
    check(slopes, jax.tree.map(np.zeros_like, slopes))


@pytest.mark.parametrize("case", CASES)
def test_gradient_is_that_of_the_value(case):
    """By central differences along the gradient itself."""
    _, slopes, _ = value_and_grad(case, STUDENT, TEACHER, ROWS_OF)
    square = sum(np.sum(x**2) for x in jax.tree.leaves(states(slopes)))
    size = np.float32(0.02 / np.sqrt(square))

    def total(step):
        moved = jax.tree.map(lambda x, slope: x + step * slope, STUDENT, slopes)
        return value_and_grad(case, moved, TEACHER, ROWS_OF)[0]

    slope = (total(size) - total(-size)) / (2 * size)
    np.testing.assert_allclose(slope, square, rtol=5e-3)


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_states_are_compared_in_float32(case):
    student, teacher = (mapped(lambda x: x.astype(jnp.bfloat16), out) for out in (STUDENT, TEACHER))
    whole = [mapped(lambda x: x.astype(np.float32), out) for out in (student, teacher)]
    total, _, _ = value_and_grad(case, student, teacher, ROWS_OF)
    assert total.dtype == jnp.float32
    np.testing.assert_allclose(total, value_and_grad(case, *whole, ROWS_OF)[0], rtol=1e-6)
