"""Span heads: the classes are the row's tokens, and padding has a logit of -1e9."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax.errors import UserError
from kd_jax.objectives.objective import build_objective
from kd_jax.types import Batch, ModelOutput
from tests.objectives import naive
from tests.objectives.rows import DIVERGENCES, FP32

LENGTHS = (5, 3, 4, 0)  # the last row fills the batch up
LABELS = np.array([[1, 4], [0, 0], [2, 3], [0, 0]], np.int32)
SETTINGS = {
    f"{name}_{t}": {"weight": 1.0, "term": name} | ({"temperature": t} if t > 1 else {})
    for name, make in DIVERGENCES.items()
    for t in ((1.0, 3.0) if make().has_temperature else (1.0,))
}
SCALES = {name: 0.5 + 0.25 * i for i, name in enumerate(SETTINGS)}


def logits(seed):
    return np.random.default_rng(seed).normal(size=(4, 2, 5)).astype(np.float32) * 2


def padded(logits_BPT, length, fill=-1e9):
    """(4, 2, length), with `fill` at padding."""
    wide = np.full((4, 2, length), fill, np.float32)
    for row, used in enumerate(LENGTHS):
        wide[row, :, :used] = logits_BPT[row, :, :used]
    return wide


def batch(length):
    mask = np.arange(length) < np.array(LENGTHS)[:, None]
    return Batch(
        ids_B=jnp.array([0, 1, 2, -1]),
        tokens_BT=jnp.ones((4, length), jnp.int32),
        mask_BT=jnp.asarray(mask, jnp.float32),
        labels=jnp.asarray(LABELS),
        weights=jnp.ones((4, 2)) * (np.array(LENGTHS) > 0)[:, None],
    )


def run(student_BPT, teacher_BPT):
    """(totals, gradient of the scaled sum by the student's logits)."""
    objective, *_ = build_objective(SETTINGS, 10, FP32, FP32)
    rows = batch(student_BPT.shape[-1])
    scales = {name: jnp.float32(scale) for name, scale in SCALES.items()}
    teacher = ModelOutput(jnp.asarray(teacher_BPT), None, None)

    @jax.jit
    def loss(student_BPT):
        student = ModelOutput(student_BPT, None, None)
        return objective({}, student, teacher, objective.dense_labels(rows), scales, {})

    slope, totals = jax.grad(loss, has_aux=True)(jnp.asarray(student_BPT))
    return totals, np.asarray(slope)


@pytest.mark.parametrize("fill", [-1e9, -87.5])
def test_every_divergence_ignores_padding(fill):
    """Of the student, and of a teacher that may be an average: of logits, or of probabilities,
    whose logarithms are floored."""
    ours, theirs = logits(1), logits(2)
    totals, slope = run(padded(ours, 5), padded(theirs, 5, fill))
    longer = run(padded(ours, 9), padded(theirs, 9, fill))
    wanted = dict.fromkeys(totals, 0.0)
    for row, length in enumerate(LENGTHS[:3]):
        args = (ours[row, :, :length], theirs[row, :, :length], LABELS[row])
        args = (*(x.astype(np.float64) for x in args[:2]), args[2])
        for name, settings in SETTINGS.items():
            each = naive.value(settings["term"], *args, settings.get("temperature", 1.0))
            wanted[name] += each.sum()
        wanted["kl_t1"] += naive.value("kl", *args, 1.0).sum()
        slopes = [
            SCALES[name] * naive.grad(settings["term"], *args, settings.get("temperature", 1.0))
            for name, settings in SETTINGS.items()
        ]
        atol = 1e-5 * np.abs(slopes).max()
        np.testing.assert_allclose(slope[row, :, :length], sum(slopes), atol=atol)
    for name, total in wanted.items():
        np.testing.assert_allclose(totals[name], total, rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(longer[0][name], total, rtol=1e-5, err_msg=name)
    padding = np.asarray(batch(5).mask_BT == 0)[:, None].repeat(2, axis=1)
    assert not slope[padding].any()
    np.testing.assert_allclose(longer[1][..., :5], slope, rtol=1e-5, atol=1e-5)
    assert not longer[1][..., 5:].any()


def test_all_positions_make_no_sense():
    objective, *_ = build_objective({"kl": {"weight": 1.0, "positions": "all"}}, 10, FP32, FP32)
    with pytest.raises(UserError, match="objective.kl.positions='all' .* a row has 2 labels"):
        objective.dense_labels(batch(5))


def test_heads_of_other_classes_are_refused():
    three, four = (np.zeros((4, 2, n), np.float32) for n in (3, 4))
    with pytest.raises(UserError, match="student's head gives 4 logits a row and the teacher's 3"):
        run(four, three)
