"""The schedule of a substitution, and one swap of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import substitute_gpt2, substitute_phi1
from kd_jax.errors import UserError
from kd_jax.models import compact
from kd_jax.recipes import plan
from kd_jax.report import plan as tables
from kd_jax.run.run import build
from kd_jax.stages import swaps
from kd_jax.train import optim
from tests.recipes import substituting


@pytest.mark.parametrize(
    ("module", "whole", "published"),
    [(substitute_gpt2, 124_439_808, 30.68), (substitute_phi1, 1_418_270_720, 30.16)],
)
def test_reductions_of_the_paper(module, whole, published):
    config = module.get_config()
    config.scan = "always"  # equal blocks are traced once
    found = plan.needed(build(config, None, jax.devices()[:1]))
    assert found["params_teacher"] == whole and found["stage"] == "substitute"
    reductions = [row["reduction_percent"] for row in found["phases"]]
    assert reductions == sorted(set(reductions)) and reductions[-1] == found["reduction_percent"]
    assert abs(reductions[-1] - published) <= 0.5
    assert found["phases"][-1]["parameters"] == found["params_student"]
    table = tables.phases(found)
    assert table.rows[0][-2:] == [f"{whole:,}", "0.00%"] and len(table.rows) == 1 + len(reductions)
    assert table.rows[1][2] == ("11" if module is substitute_gpt2 else "by importance")


def schedule(tmp_path, **changes):
    return swaps.of(substituting.build(substituting.config(tmp_path, **changes)))


def test_phases_cover_the_stage_and_tell_the_sizes(tmp_path):
    found = schedule(tmp_path, order=[1, 0, 2], blocks=2, target=0.4)
    assert [(each.start, each.end) for each in found] == [(0, 3), (3, 10)]
    assert [each.layers for each in found] == [(1, 0), (2,)]
    assert [each.births for each in found] == [(1, 1, 0), (1, 1, 2)]
    assert found[1].before is found[0].model
    for each in found:
        assert each.parameters == compact.size(each.model.family, each.model.config, "clm")
        kinds = [each.model.config.shape(layer).kind for layer in range(3)]
        assert kinds == ["bottleneck" if birth else "full" for birth in each.births]


@pytest.mark.parametrize(("target", "count"), [(0.1, 1), (0.17, 2), (0.4, 3)])
def test_swaps_end_when_the_target_is_reached(tmp_path, target, count):
    found = schedule(tmp_path, blocks=1, target=target)
    assert sum(len(each.layers) for each in found) == count


def test_orders():
    def order(given, importance=None):
        settings = substitute_gpt2.get_config().substitution
        settings.order = given
        return swaps.order(settings, 4, importance)

    assert order("last_first") == [3, 2, 1, 0] and order("first_first") == [0, 1, 2, 3]
    assert order([2, 0]) == [2, 0]
    assert order("importance") == [3, 2, 1, 0]
    assert order("importance", [0.4, 0.1, 0.3, 0.1]) == [3, 1, 2, 0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(target=0.6), r"target=0.6: .* at most 0.49\d*, which is reached with all 3 blocks"),
        (dict(target=0.4, order=[2]), r"at most 0.16\d*, which is reached with all 1 blocks"),
        (dict(target=0.0), "target=0: want a share above 0"),
        (dict(order=[0, 3]), "order: no block 3: the model has blocks 0 to 2"),
        (dict(order=[1, 1]), r"order=\[1, 1\]: name at least one block, none of them twice"),
        (dict(order=[]), r"order=\[\]: name at least one block"),
        (dict(order="random"), "order='random': have last_first, first_first, importance, or a li"),
        (dict(kind="thin"), "kind='thin': have bottleneck, slim"),
        (dict(kind="slim"), "width=8: slim blocks are as wide as the model; set it to 0"),
        (dict(width=9, num_heads=2), "2 heads do not divide the width 9"),
        (dict(ffn_width=4000), r"a compact block would have [\d,]+ parameters, the model's own"),
        (
            dict(steps=5),
            "3 phases of 5 steps need more than the 10 steps before the last, the stag",
        ),
        (dict(init="pruned"), "only a slim block can start as a part of a full one"),
        (dict(init="zeros"), "init is 'zeros'; have: random, pruned"),
    ],
)
def test_mistakes(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        substituting.checked(substituting.config(tmp_path, **changes))


def test_heads_that_have_no_counterpart(tmp_path):
    config = substituting.config(tmp_path)
    config.objective.attention = dict(weight=1.0, layers="last", causal=True)
    with pytest.raises(
        UserError, match="compares heads one by one, the teacher has 2 and a compact"
    ):
        substituting.checked(config)
    config.objective.attention.heads = "mean"
    substituting.checked(config)


def filled(value):
    """An array of the shape of another; by numpy, which compiles nothing."""
    return lambda like: np.full(like.shape, value, like.dtype)


@pytest.fixture(scope="module")
def swapped(tmp_path_factory):
    """(original, first state, the second phase's) where all moments of the first are its step."""
    folder = tmp_path_factory.mktemp("swap")
    run = substituting.build(substituting.config(folder), folder)
    (folder / "substitute").mkdir()
    with substituting.quick():
        original = jax.tree.map(filled(0.5), run.models["teacher"].abstract().params)
        first, second, _ = run.principal.phases(run, {"teacher": original})
        state = first.enter(None)
        moments = jax.tree.map(lambda x: jax.device_put(filled(3)(x), x.sharding), state.opt_state)
        state = state.replace(step=jnp.int32(3), opt_state=moments)
        return original, state, second.enter(state)


def test_a_swap_touches_only_the_blocks_that_go(swapped):
    original, before, after = swapped
    blocks = [
        each["backbone"].get("blocks")
        for each in (original, before.params["student"], after.params["student"])
    ]
    jax.tree.map(np.testing.assert_array_equal, blocks[1][0], blocks[0][0])
    jax.tree.map(np.testing.assert_array_equal, blocks[2][2], blocks[1][2])
    assert set(blocks[2][1]) == {"down", "inner", "up"} != set(blocks[1][1])
    for part in ("tokens", "positions", "norm"):
        kept = (each["backbone"][part] for each in (original, after.params["student"]))
        jax.tree.map(np.testing.assert_array_equal, *kept)
    assert int(after.step) == 3


def test_a_swap_keeps_moments_and_counts_of_what_stays(swapped):
    *_, after = swapped
    found = {
        jax.tree_util.keystr(path): np.unique(np.asarray(leaf))
        for path, leaf in jax.tree_util.tree_leaves_with_path(after.opt_state)
    }
    counts = {path: list(values) for path, values in found.items() if path.endswith("count")}
    # Adam's of three generations; of the warm-up, those of the two compact ones.
    assert len(counts) == 5
    for path, values in found.items():
        assert list(values) == ([0] if "born_2" in path else [3]), path
    new = [path for path in found if "born_2" in path and "['mu']" not in path]
    assert all("['blocks'][1]" in path for path in new if "count" not in path)


def test_compact_blocks_learn_at_their_own_rate(tmp_path):
    """The update of a gradient of ones is minus the rate: 5e-3 where it is 1e-3 elsewhere."""
    config = substituting.config(tmp_path, warmup=0)
    config.optim.weight_decay, config.optim.clip_norm = 0.0, 0.0
    run = substituting.build(config)
    shapes = swaps.of(run)[1].model.abstract().params
    params = {"student": jax.tree.map(filled(0), shapes), "objective": {}}
    groups = swaps.of(run)[1].groups(run.config.substitution, run.principal.optim)
    optimizer = optim.make_optimizer(config.optim, params, groups)

    @jax.jit
    def step(grads, params):
        return optim.apply(optimizer, grads, optimizer.init(params), params, jnp.float32(1e-3))

    moved, _ = step(jax.tree.map(filled(1), params), params)
    model = moved["student"]["backbone"]
    for layer, rate in ((0, 1e-3), (1, 5e-3), (2, 5e-3)):
        for leaf in jax.tree.leaves(model["blocks"][layer]):
            np.testing.assert_allclose(leaf, -rate, rtol=1e-5)
    np.testing.assert_allclose(model["tokens"]["embedding"], -1e-3, rtol=1e-5)
