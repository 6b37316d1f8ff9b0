"""Compact blocks and pruning: what a smaller model keeps of the one it was made from."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax.errors import UserError
from kd_jax.models import blueprint, compact, model_config
from kd_jax.models import family as families
from kd_jax.models.model_config import BlockShape
from kd_jax.precision import Policy
from tests.models import tiny

compiled = jax.jit(lambda model, batch: model(batch))
KEY = jax.random.key(7)
SLIM = BlockShape("full", 32, 2, 2, 8, 20)
GROUPED = BlockShape("full", 32, 4, 2, 8, 24)  # two heads share keys and values
NARROW = model_config.bottleneck(12, 3, 3, 18)


def run(model, batch):
    return np.asarray(compiled(model, batch).features)


def gpt2(**changes):
    """(model, family, config) of a tiny GPT-2 with three layers of 4 heads and 24 columns."""
    changes = {"n_layer": 3, "n_inner": 24} | changes
    blocks = changes.pop("blocks", ())
    family, config = families.read(tiny.CONFIGS["gpt2"] | changes)
    config = dataclasses.replace(config, blocks=blocks)
    return tiny.model("gpt2", blocks=blocks, **changes), family, config


def block(model, layer):
    return model.params["backbone"]["blocks"][layer]


def without(params, *layers):
    """The parameters with blocks that add nothing."""
    blocks = dict(params["backbone"]["blocks"])
    for layer in layers:
        blocks[layer] = jax.tree.map(np.zeros_like, blocks[layer])
    return params | {"backbone": params["backbone"] | {"blocks": blocks}}


def test_size_is_known_without_arrays():
    family, config = families.read(blueprint.preset("gpt2"))
    assert compact.size(family, config, "clm") == 124_439_808
    half = dataclasses.replace(config.own_shape, num_heads=6, num_kv_heads=6, ffn_width=1536)
    config = dataclasses.replace(config, blocks=(half,) * 12)
    per_head, per_column = 4 * 768 * 64 + 3 * 64, 2 * 768 + 1
    assert 124_439_808 - compact.size(family, config, "clm") == 12 * (
        6 * per_head + 1536 * per_column
    )


@pytest.mark.parametrize("shape", [SLIM, NARROW], ids=["slim", "bottleneck"])
def test_a_random_block_starts_as_if_left_out(shape):
    model, family, config = gpt2()
    changed, new = compact.replace(model, family, config, [2, 0], shape, "random", KEY)
    assert new.blocks == (shape, config.own_shape, shape)
    jax.tree.map(np.testing.assert_array_equal, block(changed, 1), block(model, 1))
    for name in ("tokens", "positions", "norm"):
        ours, theirs = (each.params["backbone"][name] for each in (changed, model))
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    batch = tiny.batch("gpt2")
    found, whole = run(changed, batch), run(model, batch)
    dropped = run(model.replace(params=without(model.params, 0, 2)), batch)
    assert np.abs(found - dropped).max() < 1e-3 < 1e-2 * np.abs(found - whole).max()
    assert np.abs(found - dropped).max() > 0  # and its weights have gradients
    # Blocks of one call, and of another key, have values of their own.
    again, _ = compact.replace(model, family, config, [0], shape, "random", jax.random.key(8))
    kernels = [
        jax.tree.leaves(jax.tree.map(lambda x: np.ravel(x)[:4], each))
        for each in (block(changed, 0), block(changed, 2), block(again, 0))
    ]
    for other in kernels[1:]:
        assert any((a != b).any() for a, b in zip(kernels[0], other, strict=True))


def test_a_slim_block_of_an_encoder_keeps_the_norms():
    """Its output has the features' sizes that the next block knows, though it adds nothing."""
    model = tiny.model("bert")
    family, config = families.read(tiny.CONFIGS["bert"])
    changed, new = compact.replace(model, family, config, [0], SLIM, "random", KEY)
    assert new.blocks == (SLIM, config.own_shape)
    jax.tree.map(np.testing.assert_array_equal, block(changed, 1), block(model, 1))
    old = block(model, 0)
    for name in ("attention_norm", "mlp_norm"):
        jax.tree.map(np.testing.assert_array_equal, block(changed, 0)[name], old[name])
    out = compiled(changed, tiny.batch("bert"))
    x, y = (np.asarray(hidden, np.float64) for hidden in out.hidden[:2])
    for name in ("attention_norm", "mlp_norm"):
        x = x - x.mean(-1, keepdims=True)
        scale, bias = (np.asarray(old[name][key]) for key in ("scale", "bias"))
        x = x / x.std(-1, keepdims=True) * scale + bias
    assert 0 < np.abs(y - x).max() < 0.05


def test_a_bottleneck_of_an_encoder_starts_as_if_left_out():
    model = tiny.model("distilbert")
    family, config = families.read(tiny.CONFIGS["distilbert"])
    changed, _ = compact.replace(model, family, config, [1], NARROW, "random", KEY)
    out = compiled(changed, tiny.batch("distilbert"))
    x, y = (np.asarray(hidden) for hidden in out.hidden[1:])
    assert 0 < np.abs(y - x).max() < 1e-2 < np.abs(x).max()


@pytest.mark.parametrize(
    ("shape", "init"), [(SLIM, "random"), (SLIM, "pruned"), (NARROW, "random")]
)
def test_abstract_models_are_replaced_alike(shape, init):
    model, family, config = gpt2()
    abstract = families.abstract(family, config, "clm", Policy())
    given = (family, config, [1], shape, init, KEY)
    ours, theirs = compact.replace(model, *given), compact.replace(abstract, *given)
    assert ours[1] == theirs[1] and ours[0].graphdef == theirs[0].graphdef
    described = [
        jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), each.params)
        for each in (ours[0], theirs[0], families.abstract(family, ours[1], "clm", Policy()))
    ]
    assert described[0] == described[1] == described[2]
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(theirs[0].params))


def quieten(model, layer, heads, columns, factor, groups=()):
    """The model with weights of these heads, key/value heads and columns times `factor`."""
    own = block(model, layer)
    own = own.get("inner", own)

    def times(weights, key, where):
        weights[key] = np.array(weights[key])
        weights[key][where] *= factor

    for name in "qkvo":
        weights = own["attention"][name]
        for head in groups if name in "kv" else heads:
            of_head = slice(8 * head, 8 * head + 8)
            where = of_head if name == "o" else (slice(None), of_head)
            times(weights, "kernel", where)
            if name != "o" and "bias" in weights:
                times(weights, "bias", of_head)
    for name in ("up", "gate", "down"):
        weights = own["mlp"].get(name)
        for column in columns if weights else ():
            where = column if name == "down" else (slice(None), column)
            times(weights, "kernel", where)


def test_a_pruned_block_is_the_best_of_the_old_one():
    model, family, config = gpt2()
    quieten(model, 1, heads=[0, 2], columns=[3, 5, 6, 23], factor=1e-6, groups=[0, 2])
    changed, new = compact.replace(model, family, config, [1], SLIM, "pruned", KEY)
    assert new.blocks == (config.own_shape, SLIM, config.own_shape)
    batch = tiny.batch("gpt2")
    np.testing.assert_allclose(run(changed, batch), run(model, batch), atol=1e-5)
    same, new = compact.replace(model, family, config, [1], config.own_shape, "pruned", KEY)
    jax.tree.map(np.testing.assert_array_equal, same.params, model.params)
    assert new == config and new.blocks == ()


@pytest.mark.parametrize(
    ("heads", "groups", "wanted"),
    [
        ([2, 3], [1], (2, 1)),  # a key/value head with those that share it
        ([1, 2], [], (2, 2)),  # the better of those that share one
        ([0, 2, 3], [1], (1, 1)),
    ],
)
def test_shared_heads_are_pruned_within_their_groups(heads, groups, wanted):
    model, family, config = gpt2(blocks=(GROUPED,) * 3)
    quieten(model, 0, heads, columns=[], factor=1e-6, groups=groups)
    shape = dataclasses.replace(GROUPED, num_heads=wanted[0], num_kv_heads=wanted[1])
    changed, new = compact.replace(model, family, config, [0], shape, "pruned", KEY)
    assert new.blocks == (shape, GROUPED, GROUPED)
    batch = tiny.batch("gpt2")
    np.testing.assert_allclose(run(changed, batch), run(model, batch), atol=1e-5)


@pytest.mark.parametrize(
    ("layers", "shape", "init", "says"),
    [
        ([0, 3], SLIM, "random", "no block 3: the model has blocks 0 to 2"),
        ([-1], SLIM, "random", "no block -1"),
        ([0], SLIM, "fitted", "init is 'fitted'; have: random, pruned"),
        ([0], NARROW, "pruned", "only a slim block can start as a part of a full one"),
        ([0], dataclasses.replace(SLIM, head_width=4), "pruned", "heads are 8 wide, .* 4; with"),
        ([0], dataclasses.replace(SLIM, ffn_width=25), "pruned", "has 24 FFN columns, .* have 25"),
        ([0], dataclasses.replace(SLIM, num_heads=4), "pruned", "1 heads to a key/value head"),
    ],
)
def test_refuses_blocks_that_cannot_be(layers, shape, init, says):
    model, family, config = gpt2()
    with pytest.raises(UserError, match=says):
        compact.replace(model, family, config, layers, shape, init, KEY)


def parameters(model):
    return sum(leaf.size for leaf in jax.tree.leaves(model.params))


@pytest.mark.parametrize("ranking", ["global", "layer"])
def test_what_adds_nothing_is_pruned_first(ranking):
    model, family, config = gpt2()
    lost = [([1], [0, 4]), ([3], [7, 9]), ([0], [22, 23])]
    for layer, (heads, columns) in enumerate(lost):
        quieten(model, layer, heads, columns, factor=0.0, groups=heads)
    head, column = 4 * 32 * 8 + 3 * 8, 2 * 32 + 1
    target = 3 * (head + 2 * column) / parameters(model)
    changed, new = compact.prune(model, family, config, target - 1e-9, ranking)
    assert (
        new.blocks
        == (dataclasses.replace(config.own_shape, num_heads=3, num_kv_heads=3, ffn_width=22),) * 3
    )
    assert parameters(changed) == compact.size(family, new, "clm")
    assert parameters(model) - parameters(changed) == 3 * (head + 2 * column)
    batch = tiny.batch("gpt2")
    np.testing.assert_allclose(run(changed, batch), run(model, batch), atol=1e-5)


@pytest.mark.parametrize("ranking", ["global", "layer"])
@pytest.mark.parametrize("target", [0.02, 0.4])
def test_prunes_to_the_target_and_hardly_more(ranking, target):
    blocks = (SLIM, NARROW, GROUPED)
    model, family, config = gpt2(blocks=blocks)
    changed, new = compact.prune(model, family, config, target, ranking)
    before, after = parameters(model), parameters(changed)
    assert after == compact.size(family, new, "clm")
    column = 2 * 32 + 1
    most = column if ranking == "global" else 3 * column  # a column of one layer, or of each
    assert target * before <= before - after < target * before + most
    for old, shape in zip(blocks, new.blocks, strict=True):
        assert shape.num_heads % shape.num_kv_heads == 0
        assert shape.num_heads // shape.num_kv_heads == old.num_heads // old.num_kv_heads
        same = ("kind", "width", "head_width")
        assert [getattr(shape, name) for name in same] == [getattr(old, name) for name in same]
    assert np.isfinite(run(changed, tiny.batch("gpt2"))).all()


def test_layers_that_were_alike_stay_so():
    model, family, config = gpt2()
    _, even = compact.prune(model, family, config, 0.3, "layer")
    assert len(set(even.blocks)) == 1
    _, new = compact.prune(model, family, config, 0.3, "global")
    assert len(set(new.blocks)) > 1
    # Without values every layer loses the same.
    abstract = families.abstract(family, config, "clm", Policy())
    for ranking in ("layer", "global"):
        found, new = compact.prune(abstract, family, config, 0.3, ranking)
        assert new == even
        assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(found.params))


@pytest.mark.parametrize("name", ["llama", "phi", "qwen2", "bert", "distilbert", "gemma3_text"])
def test_other_families(name):
    """Gates, missing biases, shared heads, parallel blocks: what goes is what adds nothing."""
    changes = {"head_dim": 8} if name == "gemma3_text" else {}
    family, config = families.read(tiny.CONFIGS[name] | changes)
    model, own = tiny.model(name, **changes), config.own_shape
    shared = own.num_heads // own.num_kv_heads
    for layer in range(2):
        quieten(model, layer, [*range(shared)], [1, 5], factor=0.0, groups=[0])
    sizes = (own.num_heads - shared, own.num_kv_heads - 1, own.ffn_width - 2)
    wanted = dataclasses.replace(
        own, **dict(zip(("num_heads", "num_kv_heads", "ffn_width"), sizes, strict=True))
    )
    smaller = dataclasses.replace(config, blocks=(wanted,) * 2)
    share = 1 - compact.size(family, smaller, compact._head(model)) / parameters(model)
    whole = run(model, tiny.batch(name))
    changed, new = compact.prune(model, family, config, share - 1e-9, "global")
    assert new.blocks == (wanted,) * 2
    np.testing.assert_allclose(run(changed, tiny.batch(name)), whole, atol=1e-5)
    again, _ = compact.replace(model, family, config, [0, 1], wanted, "pruned", KEY)
    jax.tree.map(np.testing.assert_array_equal, again.params, changed.params)


def test_norms_of_all_heads_lose_those_that_go():
    model = tiny.model("olmo2")
    family, config = families.read(tiny.CONFIGS["olmo2"])
    changed, new = compact.prune(model, family, config, 0.4, "layer")
    shape = new.blocks[0]
    assert (shape.num_heads, shape.num_kv_heads) == (2, 1)
    old, attention = (block(each, 0)["attention"] for each in (model, changed))
    for name, width in (("q", 16), ("k", 8)):
        found = attention[f"{name}_norm"]["scale"]
        kernel, whole = (np.asarray(each[name]["kernel"]) for each in (attention, old))
        at = [int(np.argmax((whole == column[:, None]).all(0))) for column in kernel.T]
        np.testing.assert_array_equal(found, np.asarray(old[f"{name}_norm"]["scale"])[at])
        assert found.shape == (width,)
    whole = families.abstract(family, new, "clm", Policy())
    assert whole.graphdef == changed.graphdef
    shapes = [jax.tree.map(jnp.shape, each.params) for each in (changed, whole)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("name", ["olmo2", "gemma3_text"])
def test_a_random_block_with_norms_at_its_end_starts_as_if_left_out(name):
    """A small output projection would do nothing there."""
    model = tiny.model(name)
    family, config = families.read(tiny.CONFIGS[name])
    shape = dataclasses.replace(config.own_shape, ffn_width=20)
    changed, _ = compact.replace(model, family, config, [0], shape, "random", KEY)
    out = compiled(changed, tiny.batch(name))
    x, y = (np.asarray(hidden) for hidden in out.hidden[:2])
    assert 0 < np.abs(y - x).max() < 0.1 < np.abs(x).max()


@pytest.mark.parametrize("ranking", ["global", "layer"])
def test_one_head_and_one_column_stay(ranking):
    model, family, config = gpt2()
    whole = parameters(model)
    least = whole - 3 * (3 * (4 * 32 * 8 + 3 * 8) + 23 * (2 * 32 + 1))
    changed, new = compact.prune(model, family, config, 1 - least / whole, ranking)
    assert parameters(changed) == least
    assert {(shape.num_heads, shape.ffn_width) for shape in new.blocks} == {(1, 1)}
    most = f"at most {int(1e4 * (1 - least / whole)) / 1e4} of this model"
    for target in (1 - least / whole + 1e-4, 1.2, 0.0):
        with pytest.raises(UserError, match=f"pruning away {target} .*{most}"):
            compact.prune(model, family, config, target, ranking)
    with pytest.raises(UserError, match="ranking='best': have global, layer"):
        compact.prune(model, family, config, 0.1, "best")


def test_importance_is_the_l1_norm_of_what_goes():
    model, _, config = gpt2(blocks=(GROUPED,) * 3)
    own = jax.tree.map(np.asarray, block(model, 0))
    heads, columns = compact.score_units(own, GROUPED)
    attention, mlp = own["attention"], own["mlp"]
    second = [attention[name]["kernel"][:, 8:16] for name in "kv"]
    second += [attention["q"]["kernel"][:, 16:], attention["o"]["kernel"][16:]]
    mean = np.mean(np.abs(np.concatenate([part.ravel() for part in second])))
    assert heads.scores[1] == pytest.approx(mean, rel=1e-5)
    assert heads.cost == sum(part.size for part in second) + 2 * 8 + 16  # and biases
    fifth = np.concatenate([mlp["up"]["kernel"][:, 5], mlp["down"]["kernel"][5]])
    assert columns.scores[5] == pytest.approx(np.abs(fifth).mean(), rel=1e-5)
    assert columns.cost == 2 * 32 + 1


def test_what_a_large_unit_takes_too_much_comes_back():
    heads = compact.Units(np.array([3.0, 9.0]), 100)
    columns = compact.Units(np.array([1.0, 2.0, 8.0, 4.0]), 7)
    gone = [
        [found.tolist() for found in compact.take_least([(heads, columns)], need)[0]]
        for need in (6, 8, 15, 100, 106, 114, 121)
    ]
    assert gone[:3] == [[[], [0]], [[], [0, 1]], [[0], []]]  # the head alone is enough
    assert gone[3:] == [[[0], []], [[0], [0]], [[0], [0, 1]], [[0], [0, 1, 3]]]
