import jax
import numpy as np
import pytest
from scipy import special

from kd_jax.evals import likelihood
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
    found = run(output, batch, 2, "float32")
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
    run = jax.jit(likelihood.of_segments, static_argnums=(2, 3)).lower(output, batch, 1, "float32")
    assert run.compile().memory_analysis().temp_size_in_bytes < tokens * vocabulary * 4 / 4
