import jax
import numpy as np
import pytest
from scipy import special, stats

from kd_jax.metrics import likelihood
from kd_jax.precision import Policy
from kd_jax.types import Batch, ModelOutput

B, T, D, V = 3, 11, 4, 23


def example(bias, segments):
    rng = np.random.default_rng(0)
    output = ModelOutput(
        rng.standard_normal((B, T, D), np.float32),
        rng.standard_normal((V, D), np.float32),
        rng.standard_normal(V, np.float32) if bias else None,
    )
    labels_BT = rng.integers(0, V, (B, T)).astype(np.int32)
    weights_BT = (rng.random((B, T)) < 0.5).astype(np.float32)
    weights_BT[2] = 0.0  # a row that fills the batch up
    segments_BT = np.sort(rng.integers(0, 3, (B, T)), axis=1).astype(np.int32)
    weights_BT *= segments_BT > 0
    batch = Batch(np.arange(B), labels_BT, np.ones((B, T)), labels_BT, weights_BT)
    return output, batch.replace(segments_BT=segments_BT if segments else None)


@pytest.mark.parametrize(("bias", "segments"), [(False, False), (True, True)])
@pytest.mark.parametrize("rows", [(128, 1024), (1, 4)])  # one chunk, and several
def test_sums_are_those_of_whole_logits(bias, segments, rows, monkeypatch):
    monkeypatch.setattr(likelihood, "ROWS", rows)
    monkeypatch.setattr(likelihood, "LOGITS", 4 * V)
    output, batch = example(bias, segments)
    run = jax.jit(likelihood.of_segments, static_argnums=(2, 3))
    found = run(output, batch, 2, Policy())
    assert found.dtype == np.float32 and found.shape == (B, 2 if segments else 1)
    logits = output.features.astype(np.float64) @ output.unembed_VD.T.astype(np.float64)
    logits += 0 if output.bias_V is None else output.bias_V
    logs = np.take_along_axis(special.log_softmax(logits, -1), batch.labels[..., None], 2)[..., 0]
    logs *= batch.weights
    if segments:
        own = [np.where(batch.segments_BT == k, logs, 0.0).sum(1) for k in (1, 2)]
        np.testing.assert_allclose(found, np.stack(own, 1), rtol=1e-5)
    else:
        np.testing.assert_allclose(found[:, 0], logs.sum(1), rtol=1e-5)


def test_only_scored_tokens_meet_the_vocabulary():
    """However many tokens, no array of the program is as large as their logits would be."""
    tokens, width, vocabulary = 16 * 512, 8, 4096
    output = ModelOutput(np.zeros((16, 512, width)), np.zeros((vocabulary, width)), None)
    zeros = np.zeros((16, 512), np.int32)
    batch = Batch(np.arange(16), zeros, zeros, zeros, np.ones((16, 512)))
    run = jax.jit(likelihood.of_segments, static_argnums=(2, 3)).lower(output, batch, 1, Policy())
    assert run.compile().memory_analysis().temp_size_in_bytes < tokens * vocabulary * 4 / 4


def test_the_likeliest_ending_is_taken():
    values = [np.array([-3.0, -1.0]), np.array([-2.0, -5.0, -2.0])]
    assert likelihood.taken(values).tolist() == [1, 0]


def test_by_character():
    found = likelihood.per_character(np.array([-6.0, -6.0, -1.0]), ["abc", "abcdef", ""])
    assert found.tolist() == [-2.0, -1.0, -np.inf]
    assert likelihood.taken([found]).tolist() == [1]


@pytest.mark.parametrize(("right", "of"), [(0, 3), (27, 100), (1000, 1000)])
def test_shares_have_an_error_and_an_interval(right, of):
    hits = np.arange(of) < right
    found = likelihood.share(hits)
    p = right / of
    assert found["value"] == p and found["error"] == pytest.approx((p * (1 - p) / of) ** 0.5)
    wanted = stats.binomtest(right, of).proportion_ci(method="wilson")
    assert found["interval"] == pytest.approx([wanted.low, wanted.high])


def test_chance():
    assert likelihood.chance([4, 4, 2]) == pytest.approx((0.25 + 0.25 + 0.5) / 3)


def test_differences():
    one, two = np.array([-1.0, -2.0, np.nan, -3.0]), np.array([-1.5, -1.0, np.nan, -3.0])
    found = likelihood.difference(one, two)
    assert found["mean_difference"] == pytest.approx(0.5)
    assert found["largest_difference"] == 1.0
    assert found["mean_change"] == pytest.approx(0.5 / 3)
    assert found["mean_difference_error"] == pytest.approx(np.std([0.5, 1, 0], ddof=1) / 3**0.5)
    assert likelihood.difference(one, one)["mean_difference"] == 0.0
    for other in (two[:3], np.zeros(4)):
        with pytest.raises(ValueError, match="not scored on the same endings"):
            likelihood.difference(one, other)


def hits(right, of=100):
    return np.arange(of) < right


@pytest.mark.parametrize(("right", "given"), [(30, False), (33, False), (36, True), (0, False)])
def test_retention_needs_an_original_above_chance(right, given):
    """Two standard errors above 0.25 are about 0.34 of 100 questions."""
    found = likelihood.retention(hits(right), hits(20), 0.25)
    assert (found["retention"] is not None) == given
    assert (found["retention_error"] is not None) == given


def test_retention():
    original, changed = hits(60), np.roll(hits(45), 5)
    found = likelihood.retention(original, changed, 0.25)
    assert found["retention"] == pytest.approx(0.75)
    assert found["agreement"] == pytest.approx((45 + 40) / 100)
    same = likelihood.retention(original, original, 0.25)
    assert (same["retention"], same["retention_error"], same["agreement"]) == (1.0, 0.0, 1.0)


def test_the_error_is_that_of_drawing_the_questions_again():
    rng = np.random.default_rng(0)
    original = rng.random(2000) < 0.6
    changed = np.where(rng.random(2000) < 0.8, original, rng.random(2000) < 0.3)
    drawn = rng.integers(0, 2000, (3000, 2000))
    ratios = changed[drawn].mean(1) / original[drawn].mean(1)
    found = likelihood.retention(original, changed, 0.25)
    assert found["retention_error"] == pytest.approx(ratios.std(), rel=0.05)


def test_compare_names_every_accuracy():
    one, two = {"acc": hits(60), "acc_norm": hits(26)}, {"acc": hits(30), "acc_norm": hits(26)}
    found = likelihood.compare(np.zeros(4), np.ones(4), one, two, 0.25)
    assert found["mean_difference"] == 1.0 and found["acc_retention"] == 0.5
    assert found["acc_norm_retention"] is None and found["acc_norm_agreement"] == 1.0
    assert "retention" not in str(likelihood.compare(np.zeros(4), np.ones(4), {}, {}, None))
