import dataclasses

import numpy as np
import pytest
from flax import nnx

from kd_jax.models import block_runs
from kd_jax.models import family as families
from kd_jax.models.blueprint import Blueprint
from kd_jax.precision import Policy
from tests.models import tiny

GEMMA = {"sliding_window_pattern": 3, "num_hidden_layers": 8}
SMOLLM = {"no_rope_layers": [1, 1, 0] * 3, "num_hidden_layers": 9}


def described(name, **changes):
    family, config = families.read(tiny.CONFIGS[name] | changes)
    head = next(iter(family.architectures))
    return Blueprint(name, family, dataclasses.replace(config, scan=True), head, Policy())


@pytest.mark.parametrize(
    ("name", "changes", "found"),
    [
        ("llama", {"num_hidden_layers": 5}, [(0, 1, 5)]),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, [(0, 1, 1), (1, 1, 1)]),
        ("gemma3_text", GEMMA, [(0, 3, 2), (6, 1, 2)]),
        ("gemma3_text", GEMMA | {"num_hidden_layers": 3}, [(0, 1, 2), (2, 1, 1)]),
        ("smollm3", SMOLLM, [(0, 3, 3)]),
        ("modernbert", {"num_hidden_layers": 6}, [(0, 1, 1), (1, 2, 2), (5, 1, 1)]),
    ],
)
def test_what_repeats_itself(name, changes, found):
    assert described(name, **changes).runs == tuple(found)


def test_stacked_blocks_come_in_the_order_of_layers():
    own = described("gemma3_text", **GEMMA)
    params = tiny.model("gemma3_text", **GEMMA).params
    frozen = nnx.merge(own.frozen().graphdef, own.freeze(params)).backbone
    found = list(block_runs.each_block(frozen.blocks, frozen.config))
    assert [block.attention.window for block in found] == [5, 5, None, 5, 5, None, 5, 5]
    for layer, block in enumerate(found):
        wanted = params["backbone"]["blocks"][layer]["attention"]["q"]["kernel"]
        np.testing.assert_array_equal(block.attention.q.kernel[...], wanted)
