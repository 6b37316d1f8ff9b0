import jax
import numpy as np
import pytest
import torch

from kd_jax.errors import UserError
from kd_jax.objectives import embedding
from kd_jax.types import ModelSpec
from tests.objectives import texts

ROWS = texts.batch()
NARROW, WIDE = ModelSpec(9, 1, vector_width=4), ModelSpec(9, 1, vector_width=7)


def tensor(out):
    """The vectors of the rows that do not fill the batch up."""
    return torch.tensor(np.asarray(out.features)[:16, 0])


def test_as_in_pytorch():
    student, teacher = (texts.vectors(ROWS, 7, seed) for seed in (1, 2))
    assert embedding.make().init(jax.random.key(0), WIDE, WIDE) == {}
    pair = tensor(student), tensor(teacher)
    wanted = torch.nn.functional.mse_loss(*pair)
    found = texts.value(embedding.make(), student, teacher, ROWS)
    assert found == pytest.approx(float(wanted), rel=1e-5)
    wanted = 1 - torch.nn.functional.cosine_similarity(*pair).mean()
    found = texts.value(embedding.make(kind="cosine"), student, teacher, ROWS)
    assert found == pytest.approx(float(wanted), rel=1e-5)


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_projection_where_widths_differ(kind):
    """At first it keeps lengths and angles; every size has its own."""
    term = embedding.make(kind=kind, dims=(4, 2))
    params = term.init(jax.random.key(0), NARROW, WIDE)
    assert jax.tree.map(np.shape, params) == {"4": {"kernel": (4, 7)}, "2": {"kernel": (2, 7)}}
    for size, own in params.items():
        kernel = np.asarray(own["kernel"])
        np.testing.assert_allclose(kernel @ kernel.T, np.eye(int(size)), atol=1e-6)
    student, teacher = texts.vectors(ROWS, 4, 1), texts.vectors(ROWS, 7, 2)
    wanted = 0.0
    for size, own in params.items():
        ours = tensor(student)[:, : int(size)] @ torch.tensor(np.asarray(own["kernel"]))
        if kind == "mse":
            wanted += torch.nn.functional.mse_loss(ours, tensor(teacher))
        else:
            wanted += 1 - torch.nn.functional.cosine_similarity(ours, tensor(teacher)).mean()
    found = texts.value(term, student, teacher, ROWS, params=params)
    assert found == pytest.approx(float(wanted), rel=1e-5)
    wider = embedding.make().init(jax.random.key(0), WIDE, NARROW)["7"]["kernel"]
    np.testing.assert_allclose(wider.T @ wider, np.eye(4), atol=1e-6)


def test_a_narrower_student_begins_with_the_longest_directions():
    vectors_ND = np.random.default_rng(0).normal(size=(40, 7)) * np.arange(1, 8) + 2.0
    left, lengths, right = np.linalg.svd(vectors_ND, full_matrices=False)
    term = embedding.make(dims=(4, 2))
    drawn = term.init(jax.random.key(0), NARROW, WIDE)
    fitted = term.fitted(drawn, lambda: vectors_ND.astype(np.float32))
    assert jax.tree.map(np.shape, fitted) == jax.tree.map(np.shape, drawn)
    for size, own in fitted.items():
        kept, kernel = int(size), np.asarray(own["kernel"])
        wanted = (left[:, :kept] * lengths[:kept]) @ right[:kept]
        np.testing.assert_allclose(vectors_ND @ kernel.T @ kernel, wanted, atol=1e-4)
    wider = embedding.make()
    drawn = wider.init(jax.random.key(0), WIDE, NARROW)
    assert wider.fitted(drawn, lambda: pytest.fail("computed"))["7"] is drawn["7"]


def test_mistakes():
    with pytest.raises(UserError, match="objective embedding: kind='l1': have mse, cosine"):
        embedding.make(kind="l1")
