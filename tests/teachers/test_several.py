import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from kd_jax.errors import UserError
from kd_jax.models import family as families
from kd_jax.models.layers import MASKED
from kd_jax.objectives.objective import build_objective
from kd_jax.precision import Policy
from kd_jax.teachers.ensemble import Member, Several, Stored, average, in_order
from kd_jax.train import sharding, step
from kd_jax.types import Batch, Encoding, StoredLogits
from tests.models import tiny
from tests.train import tiny_step

ROWS, CLASSES = 16, 3
ORDER = (2, 0, 1)  # where the task's classes stand among the second teacher's
LABELS = {"id2label": {"0": "a", "1": "b", "2": "c"}}


@functools.cache
def model(name, seed):
    return tiny.model(name, "classification", seed=seed, num_hidden_layers=1, **LABELS)


@functools.cache
def batch():
    """Rows for the first teacher and the student, and other tokens for the second."""
    rng = np.random.default_rng(0)

    def encoding(length, typed):
        lengths_B1 = rng.integers(3, length + 1, (ROWS, 1))
        mask_BT = (np.arange(length) < lengths_B1).astype(np.float32)
        tokens_BT = rng.integers(4, tiny.VOCAB, (ROWS, length)).astype(np.int32)
        types_BT = np.ones_like(tokens_BT) if typed else None
        return Encoding(tokens_BT=tokens_BT, mask_BT=mask_BT, types_BT=types_BT)

    ours, theirs = encoding(10, True), encoding(12, False)
    return Batch(
        ids_B=np.arange(ROWS, dtype=np.int32),
        tokens_BT=ours.tokens_BT,
        mask_BT=ours.mask_BT,
        types_BT=ours.types_BT,
        labels=rng.integers(0, CLASSES, (ROWS, 1)).astype(np.int32),
        weights=np.ones((ROWS, 1), np.float32),
        teacher_inputs=(theirs,),
    )


def several(space="logits", weights=(0.25, 0.75)):
    first, second = model("bert", 1), model("roberta", 2)
    members = (
        Member("teacher", first.graphdef, weights[0]),
        Member("other", second.graphdef, weights[1], ORDER, 0),
    )
    return Several({"teacher": first.params, "other": second.params}, members, space)


@functools.cache
def each():
    """The two teachers' logits, (B, 1, C) in the task's order of classes."""
    (theirs,) = batch().teacher_inputs
    own = batch().replace(tokens_BT=theirs.tokens_BT, mask_BT=theirs.mask_BT, types_BT=None)
    first, second = (
        np.asarray(jax.jit(lambda m, b: m(b).logits)(*pair), np.float64)
        for pair in ((model("bert", 1), batch()), (model("roberta", 2), own))
    )
    return first, second[..., [2, 0, 1]]


def test_logits_are_averaged_in_the_task_s_order_of_classes():
    found = jax.jit(lambda t, b: t(b).logits)(several(), batch())
    first, second = each()
    np.testing.assert_allclose(found, 0.25 * first + 0.75 * second, atol=1e-5)


def test_probabilities_are_mixed():
    found = jax.jit(lambda t, b: t(b).logits)(several("probabilities"), batch())
    mixture = sum(
        w * special.softmax(z, axis=-1) for w, z in zip((0.25, 0.75), each(), strict=True)
    )
    np.testing.assert_allclose(special.softmax(found, axis=-1), mixture, atol=1e-6)


def test_states_are_those_of_the_first():
    run = jax.jit(lambda teacher, batch: teacher(batch))
    found, first = run(several(), batch()), run(model("bert", 1), batch())
    assert len(found.hidden) == 2 and len(found.attention) == 1
    jax.tree.map(np.testing.assert_array_equal, found.hidden, first.hidden)
    jax.tree.map(np.testing.assert_array_equal, found.attention, first.attention)


@pytest.mark.parametrize("xp", [np, jnp])
def test_average_against_numpy(xp):
    rng = np.random.default_rng(0)
    logits, weights = [rng.normal(0, 3, (4, 2, 5)) for _ in range(3)], [0.5, 0.2, 0.3]
    given = [xp.asarray(z, np.float32) for z in logits]
    mean = sum(w * z for w, z in zip(weights, logits, strict=True))
    np.testing.assert_allclose(average(given, weights, "logits", xp), mean, rtol=1e-5, atol=1e-6)
    mixture = sum(w * special.softmax(z, -1) for w, z in zip(weights, logits, strict=True))
    found = average(given, weights, "probabilities", xp)
    np.testing.assert_allclose(found, np.log(mixture), rtol=1e-5, atol=1e-6)
    sure = average([given[0] * 1e3, given[1]], [1.0, 0.0], "probabilities", xp)
    np.testing.assert_allclose(sure, special.log_softmax(logits[0] * 1e3, -1), rtol=1e-5)
    for space in ("logits", "probabilities"):
        assert average(given[:1], [1.0], space, xp) is given[0]
    with pytest.raises(UserError, match="averaged in 'votes': have logits, probabilities"):
        average(given, weights, "votes", xp)


def test_padding_of_spans_stays_padding():
    """At -87, the logarithm of the least float32, high temperatures would give it mass."""
    logits = [np.float32([1.0, 0.0, MASKED]), np.float32([0.0, 2.0, MASKED])]
    for space in ("logits", "probabilities"):
        assert average(logits, [0.5, 0.5], space, np)[2] < -1e8


def test_order_of_classes():
    logits = np.array([[0.0, 1.0, 2.0]])
    assert in_order(logits, None) is logits
    np.testing.assert_array_equal(in_order(logits, ORDER), [[2.0, 0.0, 1.0]])


SETTINGS = {"ce": {"weight": 0.5}, "kl": {"weight": 0.5, "temperature": 2.0}}


def stepped(teacher, rows, devices, fsdp):
    """Gradient and terms of a train step."""
    objective, *schedules = build_objective(SETTINGS, 10, Policy(), Policy(), 0)
    mesh = sharding.make_mesh(fsdp, jax.devices()[:devices])
    program = step.Program(objective, mesh, families.PARTITION, dropout=False)
    student = model("bert", 3)
    gradient = jax.jit(step.gradient, static_argnames="program")
    inputs = tiny_step.inputs(schedules)
    return jax.device_get(gradient(tiny_step.state(student), rows, teacher, inputs, program))


def check_same(ours, theirs):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), ours, theirs)


def test_one_device_eight_devices_and_stored_logits_are_the_same():
    alone = stepped(several(), batch(), 1, 1)
    assert alone[1]["kl"].value() > 0.01
    check_same(stepped(several(), batch(), 8, 4), alone)
    first, second = each()
    logits = StoredLogits(np.float32(0.25 * first + 0.75 * second))
    stored = batch().replace(stored={"teacher": logits}, teacher_inputs=())
    check_same(stepped(Stored(CLASSES), stored, 8, 1), alone)
