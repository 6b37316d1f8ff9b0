"""Decoders whose blocks differ: shapes, their checks, and the way to a folder and back."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
from flax import nnx

from kd_jax.errors import UserError
from kd_jax.metrics import flops
from kd_jax.models import family as families
from kd_jax.models import hf, model_config
from kd_jax.models.attention import Scope
from kd_jax.models.model_config import BlockShape
from kd_jax.precision import Policy
from kd_jax.types import Counted
from tests.models import tiny

run = jax.jit(lambda model, batch: model(batch))
SLIM = BlockShape("full", 32, 3, 3, 8, 20)
SMALL = model_config.bottleneck(16, 2, 2, 24)


def test_unequal_blocks_survive_a_folder(tmp_path):
    family, config = families.read(tiny.CONFIGS["gpt2"] | {"n_layer": 3, "auto_map": {"a": "b"}})
    blocks = (SLIM, config.own_shape, SMALL)
    model = tiny.model("gpt2", blocks=blocks, n_layer=3)
    config = dataclasses.replace(config, blocks=blocks)
    hf.save(tmp_path, model.params, family, config, "clm")
    found = hf.read_config(tmp_path)
    assert (found["model_type"], found["base_model_type"]) == ("kd_jax_decoder", "gpt2")
    assert "a" not in found["auto_map"]  # the file that it named is not there
    _, back = families.read(found)
    assert back == config and [back.shape(i) for i in range(3)] == list(blocks)
    loaded = families.abstract(family, back, "clm", Policy())
    assert loaded.graphdef == model.graphdef
    loaded = loaded.replace(params=hf.load(tmp_path, family, back, "clm"))
    batch = tiny.batch("gpt2")
    ours, theirs = run(loaded, batch), run(model, batch)
    np.testing.assert_array_equal(ours.features, theirs.features)
    assert [x.q_BTHK.shape[2:] for x in ours.attention] == [(3, 8), (4, 8), (2, 8)]
    # Written again without them, it is a GPT-2.
    equal = families.write(family, dataclasses.replace(back, blocks=()), "clm")
    assert equal["model_type"] == "gpt2"
    assert not {"blocks", "base_model_type", "auto_map"} & equal.keys()


def test_a_bottleneck_is_what_its_formula_says():
    model, batch = tiny.model("gpt2", blocks=(SMALL, SMALL)), tiny.batch("gpt2")
    scope = Scope(batch.mask_BT > 0, causal=True)
    out = run(model, batch)
    block = jax.tree.map(np.asarray, model.params["backbone"]["blocks"][0])
    x, y = (np.asarray(hidden) for hidden in out.hidden[:2])
    inside = x @ block["down"]["kernel"] + block["down"]["bias"]
    # A block of a GPT-2 that is as narrow as the bottleneck.
    narrow = tiny.model("gpt2", n_embd=16, n_head=2, n_inner=24, n_layer=1)
    params = narrow.params | {
        "backbone": narrow.params["backbone"] | {"blocks": {0: block["inner"]}}
    }
    backbone = nnx.merge(narrow.graphdef, params).backbone
    inner, _ = jax.jit(lambda x: backbone.blocks[0](x, scope, None, 0))(inside)
    expected = x + np.asarray(inner) @ block["up"]["kernel"] + block["up"]["bias"]
    np.testing.assert_allclose(y, expected, atol=1e-5)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"kind": "thin"}, "blocks[1]: a block's kind is 'thin'; have: full, bottleneck"),
        ({"num_heads": 0}, "blocks[1]: a block's num_heads is 0, want a whole number from 1"),
        ({"ffn_width": 2.5}, "ffn_width is 2.5"),
        ({"num_kv_heads": 2}, "blocks[1]: a block's 2 key/value heads do not divide its 3 heads"),
        ({"width": 16}, "block 1 is full and 16 wide, the model is 32"),
        ({"depth": 1}, "blocks[1] should have the keys kind, width, num_heads, "),
    ],
)
def test_refuses_a_shape_that_cannot_be(change, says):
    entries = json.loads(json.dumps(model_config.write_blocks((SMALL, SLIM))))
    entries[1] |= change
    unequal = {"model_type": "kd_jax_decoder", "base_model_type": "gpt2", "blocks": entries}
    with pytest.raises(UserError, match=re.escape(says)):
        families.read(tiny.CONFIGS["gpt2"] | unequal)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"blocks": model_config.write_blocks((SLIM,))}, "1 shapes for 2 layers"),
        ({"blocks": None}, "blocks should be a list with one entry a layer, not None"),
        ({"base_model_type": None}, "unknown base_model_type None; have: bert, "),
        (
            {"base_model_type": "bert"},
            "bert has no blocks of its own shapes, as kd_jax_decoder has",
        ),
        (
            {"model_type": "kd_jax_encoder", "base_model_type": "mobilebert"},
            "mobilebert has no blocks of its own shapes, as kd_jax_encoder has",
        ),
    ],
)
def test_refuses_a_list_that_does_not_fit(change, says):
    unequal = {"model_type": "kd_jax_decoder", "base_model_type": "gpt2"}
    with pytest.raises(UserError, match=re.escape(says)):
        families.read(tiny.CONFIGS["gpt2"] | unequal | change)


def test_a_bottlenecks_heads_divide_its_width():
    with pytest.raises(UserError, match="3 heads do not divide the width 16"):
        model_config.bottleneck(16, 3, 3, 24)


def test_flops_see_what_differs():
    per_token = {
        blocks: flops.forward(Counted(tiny.model("gpt2", blocks=blocks).params), 1, 10, 10) / 10
        for blocks in ((), (SLIM, SMALL))
    }
    own, slim = 4 * 32 * 32 + 2 * 32 * 128, 4 * 32 * 24 + 2 * 32 * 20
    small = 2 * 32 * 16 + 4 * 16 * 16 + 2 * 16 * 24
    vocabulary = 32 * tiny.VOCAB
    assert per_token[()] == 2 * (2 * (own + 2 * 10 * 32) + vocabulary)
    assert per_token[SLIM, SMALL] == 2 * (slim + small + 2 * 10 * (24 + 16) + vocabulary)


def test_windows_on_both_sides():
    family, config = families.read(tiny.CONFIGS["modernbert"] | {"num_hidden_layers": 3})
    assert config.windows == (None, 7, None)  # three tokens on each side, and the token itself
    written = families.write(family, config, "none")
    assert (written["local_attention"], written["global_attn_every_n_layers"]) == (6, 2)
    some = families.write(family, config.with_layers([0, 1, 1]), "none")
    assert some["layer_types"] == ["full_attention", *["sliding_attention"] * 2]
    assert some["global_attn_every_n_layers"] == 3
    ended = families.write(family, config.with_layers([0, 2, 1, 1, 2]), "none")
    assert ended["global_attn_every_n_layers"] is None  # no rule, so that transformers 4 stops
    assert families.read(ended)[1].windows == (None, None, 7, 7, None)


def test_flops_see_windows_on_both_sides():
    params = tiny.model("modernbert", "none").params
    whole, near = (flops.forward(Counted(params, w), 1, 20, 20) for w in ((), (None, 7)))
    assert whole - near == 2 * 2 * 20 * (20 - 7) * 32
