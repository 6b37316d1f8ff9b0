"""Heads of one number: `mse` to the labels, `logit_mse` to the teacher, and what makes no sense."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax.errors import UserError
from kd_jax.objectives.objective import build_objective
from kd_jax.types import Batch, ModelOutput
from tests.objectives.rows import DIVERGENCES, FP32, ROW_TERMS

LABELS = np.array([[0.5], [4.25], [9.0], [2.0]], np.float32)
WEIGHTS = np.array([[1], [1], [0], [1]], np.float32)
OURS = np.array([1.5, 4.0, 3e38, 2.0], np.float32)  # the third is a row that fills the batch up
THEIRS = np.array([0.0, 5.0, -3e38, 2.5], np.float32)
BATCH = Batch(
    ids_B=jnp.arange(4),
    tokens_BT=jnp.ones((4, 6), jnp.int32),
    mask_BT=jnp.ones((4, 6)),
    labels=jnp.asarray(LABELS),
    weights=jnp.asarray(WEIGHTS),
)


def output(numbers_B):
    return ModelOutput(jnp.asarray(numbers_B)[:, None, None], None, None)


@pytest.mark.parametrize("chunk", [0, 3])
def test_value_and_gradient(chunk):
    settings = {"mse": {"weight": 1.0}, "logit_mse": {"weight": 1.0}}
    objective, *_ = build_objective(settings, 10, FP32, FP32, chunk, outputs="regression")
    scales = {"mse": jnp.float32(0.5), "logit_mse": jnp.float32(2.0)}

    def loss(student):
        return objective({}, student, output(THEIRS), BATCH, scales, {})

    (value, totals), slope = jax.value_and_grad(loss, has_aux=True)(output(OURS))
    kept = [0, 1, 3]
    to_label, to_teacher = (OURS[kept] - other[kept] for other in (LABELS[:, 0], THEIRS))
    assert totals.keys() == {"mse", "logit_mse"}  # no KL of one logit
    np.testing.assert_allclose(totals["mse"], np.square(to_label).sum(), rtol=1e-6)
    np.testing.assert_allclose(totals["logit_mse"], np.square(to_teacher).sum(), rtol=1e-6)
    np.testing.assert_allclose(value, 0.5 * totals["mse"] + 2 * totals["logit_mse"], rtol=1e-6)
    wanted = np.zeros(4)
    wanted[kept] = 0.5 * 2 * to_label + 2 * 2 * to_teacher
    np.testing.assert_allclose(slope.features[:, 0, 0], wanted, rtol=1e-6)
    assert objective.denominators(BATCH) == {"mse": 3.0, "logit_mse": 3.0}


def test_mse_alone_needs_no_teacher():
    objective, *_ = build_objective({"mse": {"weight": 1.0}}, 10, FP32, None, outputs="regression")
    assert not objective.needs_teacher
    _, totals = objective({}, output(OURS), None, BATCH, {"mse": jnp.float32(1.0)}, {})
    np.testing.assert_allclose(totals["mse"], 1.0625, rtol=1e-6)


def test_mse_refuses_classes():
    objective, *_ = build_objective({"mse": {"weight": 1.0}}, 10, FP32, None, outputs="regression")
    three = ModelOutput(jnp.zeros((4, 1, 3)), None, None)
    with pytest.raises(UserError, match="mse is for a regression: the head has 3 classes"):
        jax.eval_shape(lambda: objective({}, three, None, BATCH, {"mse": 1.0}, {}))
    with pytest.raises(UserError, match="objective.mine is for a regression, and this task has cl"):
        build_objective({"mine": {"weight": 1.0, "term": "mse"}}, 10, FP32, None)


@pytest.mark.parametrize("name", sorted(ROW_TERMS))
def test_a_regression_refuses_what_compares_classes(name):
    if name in ("mse", "logit_mse"):
        build_objective({name: {"weight": 1.0}}, 10, FP32, FP32, outputs="regression")
        return
    assert name in DIVERGENCES
    with pytest.raises(UserError, match=f"objective.{name} is for classes, and a regression has n"):
        build_objective({name: {"weight": 1.0}}, 10, FP32, FP32, outputs="regression")
