import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax.errors import UserError
from kd_jax.objectives import hidden
from kd_jax.types import ModelSpec
from tests.objectives.outputs import batch, output

STUDENT, TEACHER = ModelSpec(width=5, num_layers=2), ModelSpec(width=8, num_layers=6)


def distances(kind, ours_BTD, theirs_BTD):
    """float64, (B, T)."""
    ours, theirs = (np.asarray(x, np.float64) for x in (ours_BTD, theirs_BTD))
    if kind == "mse":
        return np.mean((ours - theirs) ** 2, -1)
    norms = np.linalg.norm(ours, axis=-1) * np.linalg.norm(theirs, axis=-1)
    return 1 - (ours * theirs).sum(-1) / norms


@pytest.mark.parametrize("kind", ["mse", "cosine"])
@pytest.mark.parametrize("layers", ["uniform", "last", ((0, 0), (1, 5))])
def test_mean_over_pairs_and_tokens(kind, layers):
    rows = batch()
    student, teacher = output(rows, 2, 8, seed=1), output(rows, 6, 8, seed=2)
    term = hidden.make(kind, layers)
    pairs = {"uniform": ((1, 3), (2, 6)), "last": ((2, 6),)}.get(layers, layers)
    each = [distances(kind, student.hidden[s], teacher.hidden[t]) for s, t in pairs]
    wanted = (np.mean(each, axis=0) * np.asarray(rows.mask_BT)).sum()
    assert term.init(jax.random.key(0), ModelSpec(8, 2), TEACHER) == {}
    np.testing.assert_allclose(term.total({}, student, teacher, rows), wanted, rtol=1e-6)
    np.testing.assert_array_equal(term.weights(rows), rows.mask_BT)


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_projection_where_widths_differ(kind):
    rows = batch()
    student, teacher = output(rows, 2, 5, seed=1), output(rows, 6, 8, seed=2)
    term = hidden.make(kind, "uniform")
    params = term.init(jax.random.key(0), STUDENT, TEACHER)
    assert jax.tree.map(jnp.shape, params) == {f"pair_{i}": {"kernel": (5, 8)} for i in (0, 1)}
    assert not np.array_equal(params["pair_0"]["kernel"], params["pair_1"]["kernel"])
    each = [
        distances(kind, student.hidden[s] @ params[f"pair_{i}"]["kernel"], teacher.hidden[t])
        for i, (s, t) in enumerate(((1, 3), (2, 6)))
    ]
    wanted = (np.mean(each, axis=0) * np.asarray(rows.mask_BT)).sum()
    np.testing.assert_allclose(term.total(params, student, teacher, rows), wanted, rtol=1e-5)
    slopes = jax.grad(term.total)(params, student, teacher, rows)
    assert all(np.abs(slope).max() > 0.01 for slope in jax.tree.leaves(slopes))


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_padding_is_left_out(kind):
    rows = batch()
    student, teacher = output(rows, 2, 8, seed=1), output(rows, 6, 8, seed=2)
    term = hidden.make(kind, "uniform")
    padding = (rows.mask_BT == 0)[:, :, None]
    garbage = teacher.replace(hidden=tuple(jnp.where(padding, 1e4, x) for x in teacher.hidden))
    wanted = term.total({}, student, teacher, rows)
    np.testing.assert_array_equal(term.total({}, student, garbage, rows), wanted)
    slopes = jax.grad(lambda out: term.total({}, out, garbage, rows))(student).hidden
    for i, slope in enumerate(slopes):
        assert not np.asarray(jnp.where(padding, slope, 0.0)).any()
        assert np.asarray(slope).any() == (i > 0)


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_nothing_to_learn_from_oneself(kind):
    rows = batch()
    student = output(rows, 2, 8, seed=1)
    term = hidden.make(kind, "uniform")
    total, slope = jax.value_and_grad(lambda out: term.total({}, out, student, rows))(student)
    np.testing.assert_allclose(total, 0.0, atol=1e-5)
    for array in slope.hidden:
        np.testing.assert_allclose(array, 0.0, atol=1e-6)


def test_bfloat16_states_are_compared_in_float32():
    rows = batch()
    student, teacher = (output(rows, 2, 8, seed).replace(features=jnp.zeros(1)) for seed in (1, 2))
    student, teacher = (
        jax.tree.map(lambda x: x.astype(jnp.bfloat16), out) for out in (student, teacher)
    )
    whole = [jax.tree.map(lambda x: x.astype(jnp.float32), out) for out in (student, teacher)]
    term = hidden.make()
    total = term.total({}, student, teacher, rows)
    assert total.dtype == jnp.float32
    np.testing.assert_array_equal(total, term.total({}, *whole, rows))


def test_one_projection_for_all_pairs():
    """TinyBERT's: of the embeddings too."""
    rows = batch()
    student, teacher = output(rows, 2, 5, seed=1), output(rows, 6, 8, seed=2)
    pairs = ((0, 0), (1, 3), (2, 6))
    term = hidden.make("mse", pairs, shared_projection=True)
    params = term.init(jax.random.key(0), STUDENT, TEACHER)
    assert jax.tree.map(jnp.shape, params) == {"shared": {"kernel": (5, 8)}}
    kernel = params["shared"]["kernel"]
    each = [distances("mse", student.hidden[s] @ kernel, teacher.hidden[t]) for s, t in pairs]
    wanted = (np.mean(each, axis=0) * np.asarray(rows.mask_BT)).sum()
    np.testing.assert_allclose(term.total(params, student, teacher, rows), wanted, rtol=1e-5)
    assert term.init(jax.random.key(0), ModelSpec(8, 2), TEACHER) == {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "l1"}, "kind='l1': have cosine, mse"),
        ({"layers": "middle"}, "layers='middle': have uniform, last, or pairs"),
        (
            {"layers": [(3, 1)]},
            r"no pair \(3, 1\): the student has layers 0 to 2, the teacher 0 to 6",
        ),
    ],
)
def test_mistakes(settings, message):
    with pytest.raises(UserError, match=message):
        hidden.make(**settings).init(jax.random.key(0), STUDENT, TEACHER)
