import functools

import jax
import numpy as np
import pytest

from kd_jax.data.loader import Stream
from kd_jax.models import family
from kd_jax.objectives import combine
from kd_jax.precision import Policy
from kd_jax.train import sharding, step
from kd_jax.train.evaluate import evaluate
from tests.objectives import naive
from tests.train import tiny_step

ROWS = 21  # no batch size here divides them


@functools.cache
def dataset(head):
    return tiny_step.batch(head, ROWS)


def stream(head, batch_size):
    return Stream(ROWS, lambda ids, _: jax.tree.map(lambda x: x[ids], dataset(head)), batch_size)


def figures(head, devices, fsdp, batch_size, teacher=True, chunk=0):
    student, theirs = tiny_step.models(head)
    objective = combine.held_out(Policy(), Policy() if teacher else None, chunk)
    mesh = sharding.make_mesh(fsdp, jax.devices()[:devices])
    plan = step.Plan(objective, mesh, family.PARTITION)
    return evaluate(student, stream(head, batch_size), theirs if teacher else None, plan)


@functools.cache
def wanted(head):
    """In NumPy, from whole logits."""
    student, teacher = tiny_step.models(head)
    rows = dataset(head)
    ours, theirs = (
        np.asarray(jax.jit(lambda m: m(rows).logits)(model), np.float64).reshape(-1, 96)
        for model in (student, teacher)
    )
    labels, counts = rows.labels.ravel(), rows.weights.ravel().astype(np.float64)
    sums = {
        "loss": counts @ naive.value("ce", ours, theirs, labels),
        "accuracy": counts @ (ours.argmax(-1) == labels),
        "kl": counts @ naive.value("kl", ours, theirs, labels),
        "agreement": counts @ (ours.argmax(-1) == theirs.argmax(-1)),
    }
    return {name: total / counts.sum() for name, total in sums.items()}


@pytest.mark.parametrize(
    ("head", "devices", "fsdp", "batch_size"),
    [("mlm", 8, 2, 8), ("mlm", 1, 1, 32), ("clm", 8, 8, 16)],
)
def test_means_over_a_stream_whose_last_batch_is_not_full(head, devices, fsdp, batch_size):
    found = figures(head, devices, fsdp, batch_size, chunk=7)
    assert found.keys() == wanted(head).keys()
    for name, value in wanted(head).items():
        assert found[name] == pytest.approx(value, rel=1e-5), name


def test_without_a_teacher():
    found = figures("mlm", 1, 1, 8, teacher=False)
    assert found.keys() == {"loss", "accuracy"}
    assert found["loss"] == pytest.approx(wanted("mlm")["loss"], rel=1e-5)
