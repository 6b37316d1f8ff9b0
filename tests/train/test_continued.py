"""A state that goes on with another student: what is kept, what starts anew."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from kd_jax.train import optim, sharding, state
from kd_jax.train.optim import Group
from kd_jax.types import Model

TABLE = ((r"kernel$", P("fsdp", None)), (r".*", P()))
BORN = {
    0: (("blocks/0", Group("born_0")), (".*", Group("born_0"))),
    1: (("blocks/1", Group("born_1", factor=2.0, warmup=3)), (".*", Group("born_0"))),
}


def settings(**changes):
    return ConfigDict(
        dict(
            weight_decay=0.1,
            beta1=0.9,
            beta2=0.999,
            epsilon=1e-8,
            clip_norm=0.0,
            learning_rate_multipliers=((".*", 1.0),),
        )
        | changes
    )


def student(widths, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jax.device_put(rng.normal(size=shape).astype(np.float32))  # noqa: E731
    blocks = {i: {"kernel": draw(4, width), "bias": draw(width)} for i, width in enumerate(widths)}
    return {"embedding": draw(6, 4), "blocks": blocks}


def maker(phase, **changes):
    return functools.partial(optim.make_optimizer, settings(**changes), groups=BORN[phase])


apply = jax.jit(optim.apply, static_argnums=0)


def stepped(now, steps, seed=1, rate=0.01):
    """The state after that many steps on made-up gradients."""
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        draw = lambda x: rng.normal(size=x.shape).astype(np.float32)  # noqa: E731
        grads = jax.tree.map(draw, now.params)
        given = grads, now.opt_state, now.params, np.float32(rate)
        places = jax.tree.map(lambda x: x.sharding, (now.params, now.opt_state))
        params, moments = jax.device_put(apply(now.optimizer, *given), places)
        now = now.replace(step=now.step + 1, params=params, opt_state=moments)
    return now


def by_path(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


@pytest.fixture(scope="module")
def swapped():
    """(before, after): five steps, then block 1 becomes narrower; on 4 x 2 devices."""
    mesh = sharding.make_mesh(2)
    init = lambda params: {"student": params, "objective": {"w": jnp.ones(3)}}  # noqa: E731
    before = state.create(init, student([8, 8]), None, maker(0), TABLE, mesh)
    before = stepped(before, 5)
    new = before.params["student"] | {
        "blocks": before.params["student"]["blocks"] | {1: student([2])["blocks"][0]}
    }
    after = state.continued(before, Model(new, None), maker(1), TABLE, mesh)
    return before, after


def test_moments_and_count_of_what_stays_are_kept(swapped):
    before, after = (by_path(each.opt_state) for each in swapped)
    kept = {path for path in after if "born_0" in path}
    assert len(kept) == 1 + 2 * 4  # a count; two moments of embedding, block 0, the objective's
    for path in kept:
        assert after[path] is before[path]
    assert any(np.any(np.asarray(after[path]) != 0) for path in kept)
    counts = [after[path] for path in kept if path.endswith("count")]
    assert [int(count) for count in counts] == [5]


def test_what_is_new_starts_at_zero_under_its_own_count(swapped):
    after = by_path(swapped[1].opt_state)
    fresh = {path: leaf for path, leaf in after.items() if "born_1" in path}
    assert len(fresh) == 2 + 2 * 2  # counts of Adam and of the warm-up; kernel and bias
    assert all(np.all(np.asarray(leaf) == 0) for leaf in fresh.values())
    assert not any("['blocks'][1]" in path for path in after if "born_0" in path)


def test_it_goes_on_at_the_same_step_with_the_same_parameters(swapped):
    before, after = swapped
    assert int(after.step) == 5
    old, new = by_path(before.params), by_path(after.params)
    for path, leaf in new.items():
        if "['blocks'][1]" not in path:
            assert leaf is old[path], path


def test_everything_lies_where_a_new_state_would(swapped):
    _, after = swapped
    mesh = sharding.make_mesh(2)
    shapes = jax.eval_shape(lambda x: x, after.params["student"])
    init = lambda params: {"student": params, "objective": {"w": jnp.ones(3)}}  # noqa: E731
    wanted = state.create(init, shapes, None, maker(1), TABLE, mesh)
    assert jax.tree.structure(wanted) == jax.tree.structure(after)
    for path, leaf in by_path(after).items():
        assert leaf.sharding.is_equivalent_to(by_path(wanted)[path].sharding, leaf.ndim), path


def test_a_group_counts_and_warms_up_on_its_own(swapped):
    """Adam's first updates of a new parameter have the size of the learning rate, times factor and
    warm-up; under the old count they would be three times as large."""
    _, now = swapped
    clean = settings(weight_decay=0.0)
    optimizer = optim.make_optimizer(clean, now.params, BORN[1])
    ones = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), now.params)
    params, moments, sizes = now.params, now.opt_state, []
    for _ in range(5):
        moved, moments = apply(optimizer, ones, moments, params, np.float32(0.01))
        old, new = (np.asarray(x["student"]["blocks"][1]["kernel"]) for x in (params, moved))
        sizes.append((old - new).mean())
        params = moved
    np.testing.assert_allclose(sizes, 0.02 * np.array([0.25, 0.5, 0.75, 1, 1]), rtol=1e-4)
    counts = {path: int(x) for path, x in by_path(moments).items() if path.endswith("count")}
    assert sorted(counts.values()) == [5, 5, 10]


def test_groups_change_nothing_where_all_are_of_one_age():
    params = {"student": student([8, 8]), "objective": {}}
    for changes in ({}, {"clip_norm": 0.5}, {"learning_rate_multipliers": (("emb", 0), (".*", 1))}):
        both = []
        for groups in ((), BORN[0]):
            optimizer = optim.make_optimizer(settings(**changes), params, groups)
            now = state.TrainState(0, params, optimizer.init(params), None, optimizer)
            both.append(stepped(now, 3).params)
        jax.tree.map(np.testing.assert_array_equal, *both)


def test_clipping_looks_at_all_groups_together():
    params = {"student": student([8, 8]), "objective": {}}
    grads = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), params)
    numbers = dict(clip_norm=1e-3, epsilon=1e4, weight_decay=0.0)
    groups = (("blocks/1", Group("born_1")), (".*", Group("born_0")))
    optimizer = optim.make_optimizer(settings(**numbers), params, groups)
    after, _ = apply(optimizer, grads, optimizer.init(params), params, np.float32(1e4))
    moved = jax.tree.map(np.subtract, *jax.device_get((params, after)))
    assert float(optim.global_norm(moved)) == pytest.approx(1e-3, rel=2e-2)


def test_the_same_settings_give_the_same_optimizer():
    params = {"student": student([8, 8]), "objective": {}}
    first, second = (optim.make_optimizer(settings(), params, BORN[1]) for _ in range(2))
    assert first is second
