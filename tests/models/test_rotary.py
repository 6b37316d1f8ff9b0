"""Rotary embeddings and their stretches against those of PyTorch transformers."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax.errors import UserError
from kd_jax.models import family as families
from kd_jax.models import hf
from tests.models import tiny
from tests.models.test_parity import LLAMA3, torch_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

HEAD = 16
PAIRS = {
    "short_factor": [1.0, 1.1, 1.3, 1.5, 2.0, 2.0, 3.0, 4.0],
    "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0],
}
LONG = {"rope_type": "longrope", "original_max_position_embeddings": 16, **PAIRS}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 10}
CASES = {
    "default": {},
    "theta": {"rope_theta": 500.0},
    "theta inside": {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}},
    "linear": {"rope_scaling": {"type": "linear", "factor": 2.5}},
    "dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "rope_theta": 500.0},
    "yarn": {"rope_scaling": YARN, "rope_theta": 500.0},
    "yarn, all keys": {
        "rope_scaling": YARN
        | {"beta_fast": 4, "beta_slow": 0.5, "original_max_position_embeddings": 400}
        | {"mscale": 0.7, "mscale_all_dim": 1.2, "truncate": False}
    },
    "yarn by lengths": {
        "rope_scaling": {"rope_type": "yarn", "factor": None, "attention_factor": 1.3},
        "original_max_position_embeddings": 10,
    },
    "longrope": {"rope_scaling": LONG},
    "longrope, all keys": {"rope_scaling": LONG | {"factor": 3.0, "attention_factor": 1.2}},
    "longrope by factor": {"rope_scaling": LONG | {"factor": 3.0}},
    "llama3": {"rope_scaling": LLAMA3, "rope_theta": 50.0},
    "phi": {"model_type": "phi"},
    "phi, linear": {
        "model_type": "phi",
        "rope_scaling": {"rope_type": "linear", "factor": 2.5},
        "partial_rotary_factor": 0.75,
    },
    "phi, dynamic": {
        "model_type": "phi",
        "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "partial_rotary_factor": 0.5},
    },
    "phi3, part of a head": {
        "model_type": "phi3",
        "partial_rotary_factor": 0.5,
        "rope_parameters": {"rope_type": "longrope"}
        | {name: pairs[:4] for name, pairs in PAIRS.items()},
        "original_max_position_embeddings": 16,
    },
    "qwen2, yarn": {"model_type": "qwen2", "rope_scaling": YARN},
}


def theirs(hf_json, length):
    """(cosine, sine), (length, R), of HF's module."""
    config = transformers.AutoConfig.for_model(**hf_json)
    name = {"llama": "Llama", "phi": "Phi", "phi3": "Phi3", "qwen2": "Qwen2"}[hf_json["model_type"]]
    family = getattr(transformers.models, hf_json["model_type"])
    module = getattr(family, f"modeling_{hf_json['model_type']}")
    rotary = getattr(module, f"{name}RotaryEmbedding")(config)
    found = rotary(torch.zeros(1), torch.arange(length)[None])
    return [x[0, :, : x.shape[-1] // 2].numpy() for x in found]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_angles_are_those_of_pytorch(name):
    hf_json = tiny.CONFIGS["llama"] | {"hidden_size": 4 * HEAD} | CASES[name]
    family, config = families.read(hf_json)
    written = families.write(family, config, "clm")
    assert families.read(written) == (family, config)
    # Short, longer than the original length, and as long as the stretch allows.
    for length in (9, 40, config.max_tokens):
        places_BT = jnp.arange(length)[None]
        ours = config.rotary.angles(HEAD, places_BT, jnp.array([[length]]))
        for exported in (hf_json, written):
            for mine, its in zip(ours, theirs(exported, length), strict=True):
                np.testing.assert_allclose(mine[0], its, atol=2e-5)
    # What it is to be compared with would be noticed if it were not there.
    plain = families.read(tiny.CONFIGS["llama"] | {"hidden_size": 4 * HEAD})[1].rotary
    same = jnp.array_equal(
        ours[0], plain.angles(HEAD, places_BT, jnp.array([[length]]))[0][..., : ours[0].shape[-1]]
    )
    assert same == (name == "default")


def test_longrope_had_other_names():
    """Which PyTorch transformers 5.24 cannot read any more."""
    found = []
    for name in ("longrope", "su", "yarn"):
        scaling = {"type": name, **PAIRS}
        hf_json = tiny.CONFIGS["phi3"] | {"hidden_size": 4 * HEAD, "rope_scaling": scaling}
        found.append(families.read(hf_json)[1].rotary)
    assert found[0].kind == "longrope" and found[1:] == found[:1] * 2


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_long_rows_react_each_for_itself(name):
    """As in PyTorch, row by row: neither padding nor a longer row beside it changes a row."""
    sizes = {"num_hidden_layers": 1, "hidden_size": 4 * HEAD, "num_key_value_heads": 4}
    hf_json = tiny.CONFIGS["llama"] | sizes | CASES[name]
    ours = tiny.model("llama", **{key: hf_json[key] for key in hf_json.keys() - {"model_type"}})
    family, config = families.read(hf_json)
    model = torch_model(family, "clm", hf_json)
    flat = families.flatten(ours.params)
    state = {}
    for rule in hf.rules_of(family, config, "clm"):
        value = np.concatenate([flat[path] for path in rule.ours], axis=-1)
        prefix = "" if rule.hf.startswith("lm_head") else "model."
        state[prefix + rule.hf] = torch.tensor(value.T if rule.transpose else value)
    model.load_state_dict(state)
    longest = config.max_tokens
    batch = tiny.batch("llama", rows=2, length=longest)
    lengths = (longest, 9)
    mask_BT = (np.arange(longest)[None] < np.array(lengths)[:, None]).astype(np.float32)
    found = jax.jit(lambda model, batch: model(batch).logits)(ours, batch.replace(mask_BT=mask_BT))
    for row, length in enumerate(lengths):
        tokens = torch.tensor(np.asarray(batch.tokens_BT[row : row + 1, :length])).long()
        with torch.no_grad():
            wanted = model(input_ids=tokens).logits[0].numpy()
        np.testing.assert_allclose(found[row, :length], wanted, atol=1e-4)


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"rope_scaling": {"rope_type": "ntk"}}, "rope_scaling: rope_type='ntk' is not supported"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling: factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor='2' should be a number"),
        (
            {"rope_scaling": {"type": "linear", "factor": -1.0}},
            "factor is -1.0, want numbers above",
        ),
        (
            {"rope_scaling": {"type": "default", "mrope_section": [1]}},
            "rope_type='default' knows no mrope_section; have: rope_type, ",
        ),
        (
            {"rope_theta": 5.0, "rope_parameters": {"rope_theta": 6.0}},
            "rope_theta is 5.0, but 6.0 in config.json: rope_parameters; keep one",
        ),
        (
            {"rope_scaling": LLAMA3, "rope_parameters": {"rope_theta": 10_000.0}},
            "rope_scaling and rope_parameters differ",
        ),
        (
            {"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}},
            "high_freq_factor is 1.0, want more",
        ),
        ({"rope_scaling": LONG}, "short_factor has 8 numbers for 4 pairs"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
        ({"head_dim": 7}, "7 of the 7 features of a head would be rotated"),
        ({"model_type": "phi", "partial_rotary_factor": 1.5}, "12 of the 8 features"),
        ({"model_type": "phi", "head_dim": 6}, "3 of the 6 features of a head would be rotated"),
    ],
)
def test_refuses_what_it_would_get_wrong(changes, says):
    with pytest.raises(UserError, match=re.escape(says)):
        families.read(tiny.CONFIGS["llama"] | changes)
