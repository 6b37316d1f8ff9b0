import functools
import threading
import types

import jax
import numpy as np
import pytest

from kd_jax.data.encoded import Encoded
from kd_jax.data.loader import BucketStream, Stream
from kd_jax.models import family
from kd_jax.objectives.objective import held_out_objective
from kd_jax.precision import Policy
from kd_jax.train import sharding, step
from kd_jax.train.passes import ahead, delayed, evaluate, predict
from tests.models import tiny
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
    objective = held_out_objective(Policy(), Policy() if teacher else None, chunk)
    mesh = sharding.make_mesh(fsdp, jax.devices()[:devices])
    program = step.Program(objective, mesh, family.PARTITION)
    student, theirs = sharding.everywhere((student, theirs), mesh)
    with jax.transfer_guard("disallow"):
        return evaluate(student, stream(head, batch_size), theirs if teacher else None, program)


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


LABELS = {"id2label": {"0": "a", "1": "b", "2": "c"}}


@functools.cache
def encoded():
    """Rows of 3 to 16 tokens."""
    rng = np.random.default_rng(0)
    lengths_N = rng.integers(3, 17, ROWS)
    tokens_F = rng.integers(4, tiny.VOCAB, lengths_N.sum()).astype(np.int32)
    return Encoded(tokens_F, lengths_N, None, np.zeros((ROWS, 1), np.int32), 0)


@pytest.mark.parametrize(
    ("head", "devices", "fsdp"),
    [("classification", 1, 1), ("classification", 8, 4), ("span", 8, 1)],
)
def test_predict_gives_every_row_its_logits_without_padding(head, devices, fsdp):
    changes = LABELS if head == "classification" else {}
    model = tiny.model("bert", head, num_hidden_layers=1, **changes)
    rows = encoded()
    if head == "span":
        rows = Encoded(rows.tokens_F, rows.lengths_N, None, np.zeros((ROWS, 2), np.int32), 0)
    mesh = sharding.make_mesh(fsdp, jax.devices()[:devices])
    stream = BucketStream(rows.lengths_N, (8, 16), rows.batch, 8)
    placed = sharding.everywhere(model, mesh)
    with jax.transfer_guard("disallow"):
        found = predict(placed, stream.batches(), mesh, family.PARTITION)
    assert sorted(found) == list(range(ROWS))  # none of the rows that fill a batch up
    together = np.asarray(jax.jit(lambda m, b: m(b).logits)(model, rows.batch(np.arange(ROWS), 16)))
    for row, length in enumerate(rows.lengths_N):
        wanted = together[row, :, :length] if head == "span" else together[row, 0]
        assert found[row].dtype == np.float32 and found[row].shape == wanted.shape
        np.testing.assert_allclose(found[row], wanted, rtol=1e-4, atol=1e-5)


def test_results_are_read_when_the_next_batch_is_under_way():
    events = []

    def results():
        for number in range(3):
            events.append(f"ask {number}")
            yield number

    for number in delayed(results()):
        events.append(f"read {number}")
    assert events == ["ask 0", "ask 1", "read 0", "ask 2", "read 1", "read 2"]
    assert list(delayed([])) == []


def test_two_steps_at_a_time_on_one_device():
    both = threading.Barrier(2, timeout=60)  # one at a time waits in vain

    def step(number):
        both.wait()
        return 10 * number

    found = ahead(step, range(6), sharding.make_mesh(devices=jax.devices()[:1]))
    assert list(found) == [(number, 10 * number) for number in range(6)]


GPU = types.SimpleNamespace(size=1, devices=np.array([types.SimpleNamespace(platform="gpu")]))


@pytest.mark.parametrize("mesh", [sharding.make_mesh(devices=jax.devices()[:2]), GPU])
def test_what_queues_or_keeps_an_order_is_asked_by_one_thread(mesh):
    def step(number):
        assert threading.current_thread() is threading.main_thread()
        asked.append(number)
        return 10 * number

    asked, known = [], []
    for number, result in ahead(step, range(4), mesh):
        assert result == 10 * number
        known.append(len(asked))
    assert known == [2, 3, 4, 4] and asked == [0, 1, 2, 3]
