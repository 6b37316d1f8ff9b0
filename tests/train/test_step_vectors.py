"""What a step promises of terms over vectors: also those that compare texts of different devices
and micro-batches give the same loss and gradient however the batch is cut up."""

import functools

import jax
import numpy as np
import pytest

from kd_jax.models import family
from kd_jax.objectives.objective import build_objective
from kd_jax.precision import Policy
from kd_jax.train import sharding, step
from kd_jax.types import Batch, ModelSpec
from tests.models import tiny
from tests.train import tiny_step
from tests.train.test_step import check_same, run

LENGTH, TEXTS = 8, 4
SETTINGS = {
    "embedding": dict(weight=0.5, dims=(16, 8)),
    "similarity": dict(weight=0.6, temperature=0.2, teacher_temperature=0.1),
    "margin_mse": dict(weight=0.7, score="cosine"),
    "contrastive": dict(weight=0.8, symmetric=True, dims=(16, 8)),
    "hidden": dict(weight=0.9),
}
ACROSS = {name: SETTINGS[name] for name in ("similarity", "contrastive")}
SPECS = ModelSpec(16, 1, vector_width=16), ModelSpec(32, 2, vector_width=32)


@functools.cache
def models():
    """(student, teacher)."""
    size = tiny_step.STUDENT["mlm"]
    return tiny.model("bert", "embedding", seed=1, **size), tiny.model("bert", "embedding", seed=2)


def batch(examples: int = 16, filling: int = 3) -> Batch:
    rng, rows = np.random.default_rng(0), examples * TEXTS
    real = (np.arange(rows) < rows - filling * TEXTS)[:, None].astype(np.float32)
    lengths = rng.integers(3, LENGTH + 1, rows)
    return Batch(
        ids_B=np.where(real[:, 0] > 0, np.arange(rows), -1).astype(np.int32),
        tokens_BT=rng.integers(4, tiny.VOCAB, (rows, LENGTH)).astype(np.int32),
        mask_BT=(np.arange(LENGTH) < lengths[:, None]) * real,
        labels=(np.arange(rows)[:, None] % TEXTS).astype(np.int32),
        weights=real,
    )


def program(settings=SETTINGS, devices=1, fsdp=1, accumulate=1, dropout=False):
    objective, *schedules = build_objective(settings, 10, Policy(), Policy(), outputs="vector")
    mesh = sharding.make_mesh(fsdp, jax.devices()[:devices])
    return step.Program(objective, mesh, family.PARTITION, accumulate, dropout), schedules


def gradient(rows=None, **how):
    """(gradient, terms), on the host."""
    given, schedules = program(**how)
    student, teacher = models()
    own = given.objective.init(jax.random.key(0), *SPECS)
    state, inputs = tiny_step.state(student, own), tiny_step.inputs(schedules)
    return jax.device_get(run(state, rows or batch(), teacher, inputs, given))


reference = functools.cache(gradient)  # one device, one micro-batch


@pytest.mark.parametrize(
    "how",
    [
        dict(devices=8),
        dict(accumulate=4),
        dict(devices=8, fsdp=2, accumulate=2),
    ],
)
def test_same_however_it_is_computed(how):
    check_same(gradient(**how), reference())


def test_same_without_what_fills_the_batch_up():
    rows = jax.tree.map(lambda x: x[:-12], batch())
    check_same(gradient(rows=rows), reference())


def test_cached_gradient_is_that_of_the_loss():
    """With dropout: vectors that are computed twice have to be the same twice."""
    given, schedules = program(ACROSS, accumulate=4, dropout=True)
    student, teacher = models()
    rest = batch(), teacher, tiny_step.inputs(schedules, seed=5), given
    grads, terms = jax.device_get(run(tiny_step.state(student), *rest))
    square = sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads))

    def loss(size):
        moved = jax.tree.map(lambda p, g: p + size * g, student.params, grads["student"])
        found = run(tiny_step.state(student.replace(params=moved)), *rest)[1]
        return sum(schedules[0][name](0) * float(found[name].value()) for name in ACROSS)

    size = 1e-2 / np.sqrt(square)
    np.testing.assert_allclose((loss(size) - loss(-size)) / (2 * size), square, rtol=1e-2)


def test_without_a_teacher():
    """As a baseline, with micro-batches."""
    settings = {"contrastive": {"weight": 1.0}}
    objective, *schedules = build_objective(settings, 10, Policy(), None, outputs="vector")
    mesh = sharding.make_mesh(1, jax.devices()[:1])
    given = step.Program(objective, mesh, family.PARTITION, accumulate=2)
    student, _ = models()
    rest = tiny_step.state(student), batch(), None, tiny_step.inputs(schedules)
    grads, terms = jax.eval_shape(functools.partial(step.gradient, program=given), *rest)
    assert terms.keys() == {"contrastive"}
    assert jax.tree.structure(grads["student"]) == jax.tree.structure(student.params)


def test_vectors_are_cached_only_where_that_is_needed():
    plain = {name: own for name, own in SETTINGS.items() if name not in ACROSS}
    assert program(accumulate=2)[0].caches_vectors
    assert not program(accumulate=1)[0].caches_vectors
    assert not program(plain, accumulate=2)[0].caches_vectors
