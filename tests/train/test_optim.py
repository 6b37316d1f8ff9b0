import math

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from kd_jax.errors import UserError
from kd_jax.train import optim


def config(**changes) -> ConfigDict:
    return ConfigDict(
        dict(
            weight_decay=0.1,
            beta1=0.9,
            beta2=0.98,
            epsilon=1e-6,
            clip_norm=0.0,
            learning_rate_multipliers=((".*", 1.0),),
        )
        | changes
    )


def tree(seed: int):
    """Parameters as a model names them, or gradients of them."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    return {
        "student": {
            "embedding": draw(7, 4),
            "layer": {"kernel": draw(4, 3), "bias": draw(3)},
            "norm": {"scale": draw(4), "bias": draw(4)},
        },
        "objective": {"hidden": {"pair_0": {"kernel": draw(4, 5)}}},
    }


apply = jax.jit(optim.apply, static_argnums=0)


def train(settings: ConfigDict, steps: int, rates=lambda step: 0.01):
    """Parameters after `steps` steps on given gradients."""
    params = tree(0)
    optimizer = optim.make_optimizer(settings, params)
    state = optimizer.init(params)
    for i in range(steps):
        params, state = apply(optimizer, tree(i + 1), state, params, np.float32(rates(i)))
    return jax.device_get((params, state))


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
def test_adamw_is_that_of_pytorch(clip_norm):
    torch = pytest.importorskip("torch")
    factors = (("embedding", 0.1), ("student", 1.0), ("objective", 3.0))
    rates = lambda step: 0.01 * (step + 1)  # noqa: E731
    settings = config(clip_norm=clip_norm, learning_rate_multipliers=factors)
    ours, _ = train(settings, 5, rates)

    leaves, _ = jax.tree_util.tree_flatten_with_path(tree(0))
    theirs, groups = [], []
    for path, leaf in leaves:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        factor = next(factor for pattern, factor in factors if pattern in name)
        decay = 0.0 if name.endswith(("bias", "scale")) else 0.1
        theirs.append(torch.nn.Parameter(torch.tensor(np.asarray(leaf))))
        groups.append({"params": [theirs[-1]], "weight_decay": decay, "factor": factor})
    adamw = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.98), eps=1e-6)
    for step in range(5):
        for parameter, gradient in zip(theirs, jax.tree.leaves(tree(step + 1)), strict=True):
            parameter.grad = torch.tensor(np.asarray(gradient))
        if clip_norm:
            torch.nn.utils.clip_grad_norm_(theirs, clip_norm)
        for group in adamw.param_groups:
            group["lr"] = rates(step) * group["factor"]
        adamw.step()
    for wanted, found in zip(theirs, jax.tree.leaves(ours), strict=True):
        np.testing.assert_allclose(found, wanted.detach().numpy(), rtol=2e-6, atol=2e-7)


def test_vectors_do_not_decay():
    before = tree(0)
    optimizer = optim.make_optimizer(config(), before)
    zeros = jax.tree.map(np.zeros_like, before)
    after, _ = apply(optimizer, zeros, optimizer.init(before), before, np.float32(0.5))

    def check(path, old, new):
        decays = path[-1].key in ("kernel", "embedding")
        np.testing.assert_allclose(new, old * (1 - 0.5 * 0.1 if decays else 1), rtol=1e-6)

    jax.tree_util.tree_map_with_path(check, before, after)


def test_multipliers_scale_updates():
    ones, _ = train(config(), 1)
    halves, _ = train(config(learning_rate_multipliers=(("layer", 0.5), (".*", 1.0))), 1)
    before = tree(0)

    def check(path, old, one, half):
        factor = 0.5 if any(entry.key == "layer" for entry in path) else 1.0
        np.testing.assert_allclose(half - old, factor * (one - old), rtol=1e-4, atol=1e-7)

    jax.tree_util.tree_map_with_path(check, before, ones, halves)


def test_frozen_parameters_stay_and_have_no_moments():
    settings = config(learning_rate_multipliers=(("embedding|norm", 0.0), (".*", 1.0)))
    after, state = train(settings, 3)
    before = tree(0)
    for name in ("embedding", "norm"):
        jax.tree.map(np.testing.assert_array_equal, after["student"][name], before["student"][name])
    assert np.abs(after["student"]["layer"]["bias"] - before["student"]["layer"]["bias"]).min() > 0
    moments = [x.size for x in jax.tree.leaves(state) if x.ndim]
    assert sum(moments) == 2 * (12 + 3 + 20)


def test_frozen_parameters_do_not_count_in_the_norm_that_is_clipped():
    """Adam is blind to the scale of all gradients, but not to one of them growing."""
    settings = config(clip_norm=1e-3, epsilon=1.0, weight_decay=0.0)
    settings.learning_rate_multipliers = (("embedding", 0.0), (".*", 1.0))
    params, grads = tree(0), tree(1)
    optimizer = optim.make_optimizer(settings, params)
    large = {
        **grads,
        "student": {**grads["student"], "embedding": np.full((7, 4), 1e6, np.float32)},
    }
    found = [
        apply(optimizer, g, optimizer.init(params), params, np.float32(1.0))[0]
        for g in (grads, large)
    ]
    jax.tree.map(np.testing.assert_array_equal, *found)
    assert optim.global_norm(large) > 1e6  # what is logged is the whole gradient's


def test_clipping():
    """With a large epsilon Adam's first update is the gradient over epsilon, nearly."""
    params, grads = tree(0), tree(1)
    norm = float(optim.global_norm(grads))
    assert norm == pytest.approx(np.sqrt(sum(np.sum(g**2) for g in jax.tree.leaves(grads))))
    for clip_norm in (0.5, 100.0):
        settings = config(clip_norm=clip_norm, epsilon=1e4, weight_decay=0.0)
        optimizer = optim.make_optimizer(settings, params)
        after, _ = apply(optimizer, grads, optimizer.init(params), params, np.float32(1e4))
        moved = jax.tree.map(np.subtract, params, jax.device_get(after))
        assert float(optim.global_norm(moved)) == pytest.approx(min(norm, clip_norm), rel=1e-3)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ((("layer", 1.0),), "learning_rate_multipliers: no pattern covers objective/hidden/pair_0"),
        (((".*", -1.0),), "learning_rate_multipliers: '\\.\\*'=-1.0 must be at least 0"),
        (((".*", math.nan),), "=nan must be finite"),
        (((".*", 0.0),), "learning_rate_multipliers freezes every parameter"),
    ],
)
def test_mistakes(table, message):
    with pytest.raises(UserError, match=message):
        optim.make_optimizer(config(learning_rate_multipliers=table), tree(0))
