"""One training step on a mesh, with everything that a state may hold: what moved, what did not."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from kd_jax.models import family
from kd_jax.train import optim, sharding, state, step
from tests.train import tiny_step

SETTINGS = {
    "ce": {"weight": 1.0},
    "kl": {"weight": 0.5, "temperature": 2.0},
    "hidden": {"weight": 0.25},
}
OPTIM = ConfigDict(
    dict(
        weight_decay=0.1,
        beta1=0.9,
        beta2=0.999,
        epsilon=1e-8,
        clip_norm=1.0,
        learning_rate_multipliers=(("tokens/embedding", 0.0), ("blocks", 0.5), (".*", 1.0)),
    )
)


def create(program, inputs):
    student, _ = tiny_step.models("mlm")

    def init(params):
        own = program.objective.init(jax.random.key(0), *tiny_step.SPECS)
        return {"student": params, "objective": own}

    make_optimizer = functools.partial(optim.make_optimizer, OPTIM)
    return state.create(
        init, inputs, student.graphdef, make_optimizer, family.PARTITION, program.mesh
    )


@pytest.fixture(scope="module")
def stepped():
    """A step on 4 x 2 devices, and everything as it was before."""
    program, schedules = tiny_step.program(SETTINGS, devices=8, fsdp=2)
    student, teacher = tiny_step.models("mlm")
    born = create(program, student.params)
    specs = sharding.param_specs(family.PARTITION, teacher.params, program.mesh)
    placed = jax.device_put(teacher.params, sharding.shardings(specs, program.mesh))
    teacher = teacher.replace(params=placed)
    batch = sharding.place(tiny_step.batch("mlm"), program.mesh)
    inputs = tiny_step.inputs(schedules)
    run = jax.jit(step.gradient, static_argnames="program")
    grads, terms = run(born, batch, teacher, inputs, program)
    # Copies: what NumPy looks at is not donated.
    before = jax.tree.map(np.array, jax.device_get((born, teacher)))
    layout = jax.tree.map(lambda x: x.sharding, born)
    described = step.train_step.lower(born, batch, teacher, inputs, program=program).args_info[0]
    after, metrics = step.train_step(born, batch, teacher, inputs, program=program)
    return SimpleNamespace(**locals())


def test_born_where_the_table_says(stepped):
    mesh = stepped.program.mesh
    specs = sharding.param_specs(family.PARTITION, stepped.before[0].params, mesh)
    assert jax.tree.map(lambda place: place.spec, stepped.layout.params) == specs
    kernel = stepped.after.params["student"]["backbone"]["blocks"][0]["attention"]["q"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(8, 16)}
    projection = stepped.after.params["objective"]["hidden"]["pair_0"]["kernel"]
    assert {shard.data.shape for shard in projection.addressable_shards} == {(16, 32)}


def test_moments_lie_where_their_parameters_do(stepped):
    params = {
        jax.tree_util.keystr(path): place.spec
        for path, place in jax.tree_util.tree_leaves_with_path(stepped.layout.params)
    }
    moments = jax.tree_util.tree_leaves_with_path(stepped.layout.opt_state)
    found = {jax.tree_util.keystr(path): place.spec for path, place in moments}
    named = {name: [spec for path, spec in found.items() if path.endswith(name)] for name in params}
    for name, spec in params.items():
        assert named[name] == ([] if "tokens" in name else [spec, spec]), name
    assert sum(P("fsdp", None) == spec for spec in found.values()) > 10


def test_a_step_keeps_the_layout(stepped):
    same = jax.tree.map(
        lambda x, place: x.sharding.is_equivalent_to(place, x.ndim), stepped.after, stepped.layout
    )
    assert all(jax.tree.leaves(same))


def test_old_state_is_donated_and_nothing_else(stepped):
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(stepped.born))
    kept = jax.tree.leaves((stepped.teacher, stepped.batch))
    assert not any(leaf.is_deleted() for leaf in kept)
    of_state, *others = stepped.described  # also what could be donated but was of no use
    assert all(leaf.donated for leaf in jax.tree.leaves(of_state))
    assert not any(leaf.donated for leaf in jax.tree.leaves(others))


def test_teacher_does_not_change_and_is_not_in_the_state(stepped):
    jax.tree.map(np.testing.assert_array_equal, stepped.teacher.params, stepped.before[1].params)
    own = sum(leaf.size for leaf in jax.tree.leaves(stepped.after.params))
    embedding = stepped.after.params["student"]["backbone"]["tokens"]["embedding"].size
    held = sum(leaf.size for leaf in jax.tree.leaves(stepped.after) if leaf.ndim)
    assert held == own + 2 * (own - embedding)


def test_what_moves(stepped):
    before, after = stepped.before[0], jax.device_get(stepped.after)
    assert before.step == 0 and after.step == 1

    def check(path, old, new):
        name = sharding.path_name(path)
        moved = bool(np.any(old != new))
        idle = name.endswith("tokens/embedding") or name.endswith("types/embedding")
        assert moved or idle, name
        assert not (moved and "tokens/embedding" in name), name

    jax.tree_util.tree_map_with_path(check, before.params, after.params)


def test_parameters_of_the_objective_stay_out_of_the_student(stepped):
    assert set(stepped.after.params["student"]) == {"backbone", "head"}
    assert set(stepped.after.params["objective"]) == {"hidden"}
    student, _ = tiny_step.models("mlm")
    shapes = lambda tree: jax.tree.map(jnp.shape, tree)  # noqa: E731
    assert shapes(stepped.after.student.params) == shapes(student.params)


def test_update_is_that_of_the_gradient(stepped):
    """Adam's first update: the clipped gradient over its size, plus decay."""
    old, new, grads = jax.device_get(
        (stepped.before[0].params, stepped.after.params, stepped.grads)
    )
    del grads["student"]["backbone"]["tokens"]
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads)))
    assert norm > 1.0  # it is clipped

    def check(path, g):
        p, q = old, new
        for entry in path:
            p, q = p[entry.key], q[entry.key]
        name = sharding.path_name(path)
        g = g / norm
        decay = 0.0 if name.endswith(("bias", "scale")) else 0.1
        factor = 0.5 if "blocks" in name else 1.0
        wanted = p - 0.1 * factor * (g / (np.abs(g) + 1e-8) + decay * p)
        sure = np.abs(g) > 1e-5  # else rounding chooses the sign
        np.testing.assert_allclose(q[sure], wanted[sure], rtol=1e-4, atol=1e-5, err_msg=name)

    jax.tree_util.tree_map_with_path(check, grads)


def test_metrics(stepped):
    metrics, terms, grads = jax.device_get((stepped.metrics, stepped.terms, stepped.grads))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), metrics["terms"], terms)
    wanted = sum(
        settings["weight"] * terms[name].total / terms[name].weight
        for name, settings in SETTINGS.items()
    )
    np.testing.assert_allclose(metrics["loss"], wanted, rtol=1e-6)
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads)))
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
    assert set(metrics["terms"]) == {*SETTINGS, "kl_t1"}


def test_abstract_states(stepped):
    """From shapes alone, and of a state: the same shapes, types and places."""
    student, _ = tiny_step.models("mlm")
    shapes = jax.eval_shape(lambda: student.params)
    planned, wanted = create(stepped.program, shapes), state.abstract(stepped.after)

    def check(a, b):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert a.sharding.is_equivalent_to(b.sharding, len(a.shape))

    for pair in zip(jax.tree.leaves(planned), jax.tree.leaves(wanted), strict=True):
        assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in pair)
        check(*pair)
