"""The loss and its gradient are the same on every mesh, whether equal blocks are a loop or not."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from kd_jax.models import family as families
from kd_jax.models.blueprint import Blueprint
from kd_jax.precision import Policy
from kd_jax.train import sharding
from kd_jax.types import Model
from tests.models import tiny
from tests.train import tiny_step
from tests.train.test_step import check_same, run

# Terms over logits (akl has reverse KL in it, and jsd what the skews are made of), with gradients
# written out and not, and one over hidden states.
SETTINGS = {
    "ce": {"weight": 1.0},
    "kl": {"weight": 0.7, "temperature": 2.0},
    "akl": {"weight": 0.3},
    "jsd": {"weight": 0.3},
    "tvd": {"weight": 0.3, "rows": "student_entropy", "share": 0.5},
    "logit_mse": {"weight": 0.01},
    "hidden": {"weight": 0.3},
}
# For what is about the models alone.
FEW = {name: SETTINGS[name] for name in ("ce", "kl", "hidden")}
SIZES = {"num_attention_heads": 8, "num_key_value_heads": 8, "intermediate_size": 40}
WIDTHS = {"student": 16, "teacher": 32}
LAYERS = {"student": 2, "teacher": 1}
LOOPED = {"student": 3, "teacher": 2}
MORE_IDS = tiny.VOCAB + 8  # of a teacher whose vocabulary is longer
MESHES = [  # fsdp, model of 8 devices; the rest is data
    (1, 1),
    (2, 1),
    (4, 1),
    (8, 1),
    (1, 2),
    (2, 2),
    (4, 2),
    (1, 4),
    (2, 4),
    (1, 8),
]


def sizes(name: str, family: str, looped: bool) -> dict[str, int]:
    layers = (LOOPED if looped else LAYERS)[name]
    changes = SIZES | {"num_hidden_layers": layers, "hidden_size": WIDTHS[name]}
    return changes | MORE.get(family, {})


def blueprint(name: str, ids: int, family: str, looped: bool, **execution) -> Blueprint:
    changes = sizes(name, family, looped)
    family, config = families.read(tiny.CONFIGS[family] | changes | {"vocab_size": ids})
    head = next(iter(family.architectures))
    return Blueprint(name, family, dataclasses.replace(config, **execution), head, Policy())


@functools.cache
def params(name: str, ids: int, family: str, looped: bool):
    seed = 1 if name == "student" else 2
    changes = sizes(name, family, looped)
    return tiny.model(family, seed=seed, vocab_size=ids, **changes).params


def gradient(
    fsdp=1,
    model=1,
    ids=tiny.VOCAB,
    devices=8,
    accumulate=1,
    chunk=0,
    kinds=("llama", "llama"),
    terms=SETTINGS,
    looped=False,
    **execution,
):
    """(gradient, terms) on the host; tables and their gradients without padding. `kinds` are the
    families of student and teacher; `looped`: these have layers enough for loops."""
    shape = dict(devices=devices, fsdp=fsdp, model=model)
    program, schedules = tiny_step.program(terms, accumulate=accumulate, chunk=chunk, **shape)
    student = blueprint("student", tiny.VOCAB, kinds[0], looped, **execution)
    teacher = blueprint("teacher", ids, kinds[1], looped, **execution)
    rows = -(-max(ids, tiny.VOCAB) // (fsdp * model)) * fsdp * model
    student, teacher = (dataclasses.replace(x, table_rows=rows) for x in (student, teacher))
    own = program.objective.init(jax.random.key(0), student.spec, teacher.spec)
    graphdef = student.abstract().graphdef
    begun = Model(student.padded(params("student", tiny.VOCAB, kinds[0], looped)), graphdef)
    whole = params("teacher", ids, kinds[1], looped)
    frozen = teacher.frozen().replace(params=teacher.freeze(whole))
    state, batch = tiny_step.state(begun, own), tiny_step.batch(student.head)
    found = run(state, batch, frozen, tiny_step.inputs(schedules), program)
    grads, terms = jax.device_get(found)
    return grads | {"student": student.cut(grads["student"])}, terms


@functools.cache
def reference(ids=tiny.VOCAB, looped=False):
    return gradient(devices=1, ids=ids, looped=looped)


@functools.cache
def few(kinds=("llama", "llama"), looped=False):
    """As `reference`, of some terms."""
    return gradient(devices=1, kinds=kinds, looped=looped, terms=FEW)


# Layers with a window and without, in turn: what repeats itself is a loop.
MORE = {"gemma3_text": {"num_hidden_layers": 5}, "olmo2": {"num_hidden_layers": 2}}
MORE |= {"modernbert": {"num_hidden_layers": 2}, "mpnet": {"num_hidden_layers": 1}}


@pytest.mark.parametrize(("fsdp", "model"), MESHES)
def test_same_on_every_mesh(fsdp, model):
    check_same(gradient(fsdp, model), reference())


@pytest.mark.parametrize(("fsdp", "model"), [(1, 1), (4, 1), (2, 2), (1, 4)])
def test_same_with_equal_blocks_as_a_loop(fsdp, model):
    check_same(gradient(fsdp, model, scan=True, looped=True, terms=FEW), few(looped=True))


@pytest.mark.parametrize(("fsdp", "model"), [(1, 1), (4, 1), (2, 2), (1, 4)])
def test_same_with_a_loop_computed_again_for_parts_of_a_batch(fsdp, model):
    how = dict(scan=True, remat=True, accumulate=2, chunk=5)
    check_same(gradient(fsdp, model, looped=True, **how), reference(looped=True))


@pytest.mark.parametrize("kinds", [("gemma3_text", "olmo2"), ("olmo2", "gemma3_text")])
def test_same_with_norms_of_queries_and_keys_and_a_pattern_of_layers(kinds):
    check_same(gradient(2, 2, scan=True, kinds=kinds, terms=FEW), few(kinds))


def test_same_with_biases_by_distance_and_windows_on_both_sides():
    kinds = "mpnet", "modernbert"
    check_same(gradient(2, 2, kinds=kinds, terms=FEW), few(kinds))


@pytest.mark.parametrize(("fsdp", "model"), [(8, 1), (2, 2)])
def test_same_with_a_longer_vocabulary_of_the_teacher(fsdp, model):
    """Tables are padded to the same rows, and what is padding is no id."""
    found = gradient(fsdp, model, ids=MORE_IDS)
    assert found[1]["teacher_outside"].total > 0
    check_same(found, reference(MORE_IDS))


def test_same_over_two_axes_of_a_torus(monkeypatch):
    wanted = few()
    monkeypatch.setattr(sharding, "_rings", lambda devices, fsdp: (2, fsdp // 2))
    check_same(gradient(4, 2, accumulate=2, terms=FEW), wanted)


def test_remat_may_keep_products():
    how = dict(scan=True, remat=True, remat_keeps="products")
    check_same(gradient(2, 1, looped=True, terms=FEW, **how), few(looped=True))


def test_gradients_may_be_summed_in_bfloat16():
    """Those of kernels alone; the sum of two devices' is rounded, no more."""
    head, settings = "mlm", {"ce": {"weight": 1.0}}
    student, _ = tiny_step.models(head)
    program, schedules = tiny_step.program(settings, devices=2, fsdp=2, teacher=False)

    def grads(reduction):
        module_policy = Policy(reduction=reduction)
        family, config = families.read(tiny.CONFIGS["bert"] | tiny_step.STUDENT[head])
        graphdef = families.abstract(family, config, head, module_policy).graphdef
        state = tiny_step.state(Model(student.params, graphdef))
        inputs = tiny_step.inputs(schedules)
        return jax.device_get(run(state, tiny_step.batch(head), None, inputs, program))[0]

    exact, rounded = (grads(reduction)["student"] for reduction in ("float32", "bfloat16"))
    differ = jax.tree.map(lambda a, b: not np.array_equal(a, b), exact, rounded)
    block = differ["backbone"]["blocks"][0]
    assert block["attention"]["q"]["kernel"] and not block["attention"]["q"]["bias"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=0.02), exact, rounded)
