import jax
import numpy as np
import pytest
from scipy.special import log_softmax, logsumexp

from kd_jax.models import family
from kd_jax.objectives.logits import SPACES, sparse, stored
from kd_jax.train import sharding
from kd_jax.train.passes import log_probs_step
from kd_jax.train.sharding import place
from tests.models import tiny
from tests.objectives.rows import FP32

SIZE = tiny.VOCAB - 6  # what the vocabularies of teacher and student share


def batch():
    return jax.device_get(tiny.batch("qwen2", rows=8))


def run(model, batch, share=1.0, k=SIZE, space="logits", devices=8, fsdp=1):
    mesh = sharding.make_mesh(fsdp, jax.devices()[:devices])
    how = dict(vocab_size=SIZE, k=k, space=space, policy=FP32)
    found = log_probs_step(
        model, place(batch, mesh), np.float32(share), mesh=mesh, table=family.PARTITION, **how
    )
    return jax.tree.map(np.asarray, found)


@jax.jit
def compiled(model, batch):
    return jax.nn.log_softmax(model(batch).logits[..., :SIZE], axis=-1)


def logs(model, batch):
    return np.asarray(compiled(model, batch))


@pytest.mark.parametrize("space", SPACES)
def test_a_running_mean_is_the_mean(space):
    models, rows = [tiny.model("qwen2", "clm", seed=seed) for seed in range(3)], batch()
    found = run(models[0], rows, space=space)
    for n, model in enumerate(models[1:], 1):
        found = run(model, rows.replace(stored={"others": found}), 1 / (n + 1), space=space)
    stacked = np.stack([logs(model, rows) for model in models])
    if space == "logits":
        wanted = log_softmax(stacked.mean(0), axis=-1)
    else:
        wanted = logsumexp(stacked, axis=0) - np.log(3)
    np.testing.assert_allclose(found.values_BPK, wanted, atol=1e-5)
    assert found.ids_BPK is None and found.rest_BP is None


def test_neither_devices_nor_chunks_matter(monkeypatch):
    model, rows = tiny.model("qwen2", "clm"), batch()
    wanted = run(model, rows, k=5)
    np.testing.assert_allclose(
        np.exp(wanted.values_BPK), np.sort(np.exp(logs(model, rows)))[..., :-6:-1], atol=1e-6
    )
    monkeypatch.setattr("kd_jax.train.passes.CHUNK_LOGITS", 1)  # eight rows
    for devices, fsdp in ((1, 1), (8, 4)):
        found = run(model, rows, k=5, devices=devices, fsdp=fsdp)
        np.testing.assert_array_equal(found.ids_BPK, wanted.ids_BPK)
        np.testing.assert_allclose(found.values_BPK, wanted.values_BPK, atol=1e-5)
        np.testing.assert_allclose(found.rest_BP, wanted.rest_BP, atol=1e-5)


def test_the_largest_logits_go_into_the_next_mean():
    models, rows = [tiny.model("qwen2", "clm", seed=seed) for seed in range(2)], batch()
    first = run(models[0], rows, k=7)
    found = run(models[1], rows.replace(stored={"others": first}), 0.5, k=7)

    @jax.jit
    def mean_of_largest(first, logs_BTV):
        before = stored(first, SIZE)
        before_NV = before.logits(before.rows, FP32)
        return sparse((before_NV + logs_BTV.reshape(-1, SIZE)) / 2, 7)

    wanted = mean_of_largest(first, logs(models[1], rows))
    np.testing.assert_allclose(found.values_BPK.reshape(-1, 7), wanted.values_NK, atol=1e-5)
    np.testing.assert_allclose(found.rest_BP.reshape(-1), wanted.rest_N, atol=1e-5)
