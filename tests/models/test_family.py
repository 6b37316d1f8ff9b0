"""config.json in and out, random starts, and the table of shardings."""

import dataclasses
import math
import re

import jax
import numpy as np
import pytest

from kd_jax import plugins
from kd_jax.errors import UserError
from kd_jax.models import blueprint, hf
from kd_jax.models import family as families
from kd_jax.models.model_config import Dense
from kd_jax.precision import Policy
from kd_jax.types import ModelSpec
from tests.models import tiny

FAMILIES = plugins.names("models", "FAMILY")


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"model_type": "t5"}, "unknown model_type 't5'; have: bert, distilbert, electra, "),
        ({"model_type": None}, "unknown model_type None"),
        ({"model_type": "../bert"}, "unknown model_type"),
        ({"model_type": "layers"}, "unknown model_type 'layers'"),
        ({"hidden_act": "glu"}, "unknown activation 'glu'; have: gelu, "),
        ({"hidden_size": "32"}, "hidden_size='32' should be a whole number"),
        ({"hidden_size": True}, "hidden_size=True should be a whole number"),
        ({"layer_norm_eps": None}, "layer_norm_eps=None should be a number"),
        ({"tie_word_embeddings": 0}, "tie_word_embeddings should be bool"),
        ({"num_attention_heads": 5}, "5 attention heads do not divide the width 32"),
        ({"hidden_dropout_prob": 2.0}, "hidden_dropout_prob=2.0 must be at least 0 and below 1"),
        ({"model_type": "gpt2", "resid_pdrop": -0.1}, "resid_pdrop=-0.1 must be at least 0"),
        ({"model_type": "llama", "rms_norm_eps": math.nan}, "rms_norm_eps=nan must be finite"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0 must be at least 1"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key'"),
        ({"is_decoder": True}, "is_decoder=True is not supported; have: False"),
        ({"model_type": "llama", "is_causal": False}, "is_causal=False is not supported"),
        ({"add_cross_attention": True}, "add_cross_attention"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"model_type": "roberta", "pad_token_id": None}, "pad_token_id"),
        ({"model_type": "mobilebert", "normalization_type": "rms"}, "normalization_type='rms'"),
        (
            {"model_type": "mobilebert", "intra_bottleneck_size": 30},
            "4 attention heads do not divide the width inside a block, 30",
        ),
        (
            {"model_type": "mobilebert", "num_feedforward_networks": 0},
            "networks=0 must be at least 1",
        ),
        ({"model_type": "mobilebert"}, "embedding_size is 128, want 1 to the hidden_size, 32"),
        (
            {
                "model_type": "mobilebert",
                "embedding_size": 8,
                "key_query_shared_bottleneck": False,
            },
            "set use_bottleneck_attention or key_query_shared_bottleneck to true",
        ),
        ({"model_type": "gpt2", "add_cross_attention": True}, "add_cross_attention"),
        ({"model_type": "gpt2", "n_embd": 64}, "hidden_size and n_embd are one, and differ"),
        (
            {"model_type": "llama", "num_key_value_heads": 3},
            "3 key/value heads do not divide its 4 heads",
        ),
        (
            {"model_type": "gemma3_text", "num_key_value_heads": 4, "sliding_window": None},
            "layer_types has sliding_attention, but there is no window: set sliding_window",
        ),
        (
            {"model_type": "mistral", "num_key_value_heads": 4, "sliding_window": 0},
            "sliding_window is 0, want 1 at least, or null",
        ),
        (
            {"model_type": "qwen3", "layer_types": ["full_attention", "linear_attention"]},
            "layer_types has linear_attention; want sliding_attention or full_attention of each",
        ),
        (
            {"model_type": "qwen3", "layer_types": ["full_attention"]},
            "layer_types has 1 entries for 2 layers; want",
        ),
        ({"model_type": "smollm3", "no_rope_layers": [1]}, "no_rope_layers is [1], want 1 or 0"),
        (
            {"model_type": "phi3", "rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_scaling of a phi3 is 'linear'; have: default, longrope",
        ),
        ({"model_type": "mpnet", "pad_token_id": 0}, "pad_token_id=0 is not supported; have: 1"),
        (
            {"model_type": "modernbert", "classifier_pooling": "max"},
            "classifier_pooling='max' is not supported; have: 'cls', 'mean'",
        ),
        (
            {"model_type": "modernbert", "local_attention": 0},
            "local_attention=0 must be at least 1",
        ),
        ({"model_type": "modernbert", "local_rope_theta": None}, "local_rope_theta=None should be"),
        (
            {"model_type": "gemma3_text", "rope_parameters": {"rope_theta": 5.0}},
            "rope_parameters has rope_theta; have: full_attention, sliding_attention",
        ),
        (
            {"model_type": "gemma3_text", "final_logit_softcapping": 30.0},
            "final_logit_softcapping=30.0 is not supported; have: None",
        ),
        (
            {"model_type": "phi", "qk_layernorm": True},
            "qk_layernorm=True is not supported; have: False",
        ),
    ],
)
def test_refuses_what_it_would_get_wrong(changes, says):
    with pytest.raises(UserError, match=re.escape(says)):
        families.read(tiny.CONFIGS["bert"] | changes)


def test_unknown_head():
    family, config = families.read(tiny.CONFIGS["bert"])
    with pytest.raises(
        UserError, match="bert has no head 'clm'; have: mlm, classification, span, none, embedding"
    ):
        families.abstract(family, config, "clm", Policy())


@pytest.mark.parametrize("name", FAMILIES)
def test_config_survives_the_round_trip(name):
    extra = {"bos_token_id": 5, "id2label": {"0": "no"}, "torch_dtype": "float16", "n_ctx": 7}
    family, config = families.read(tiny.CONFIGS[name] | extra)
    head = next(iter(family.architectures))
    written = families.write(family, config, head)
    assert families.read(written) == (family, config)
    assert written["architectures"] == [family.architectures[head]]
    assert (written["bos_token_id"], written["id2label"]) == (5, {"0": "no"})
    assert written["dtype"] == "float32" and "torch_dtype" not in written


def test_no_padding_token_in_two_spellings():
    for found in (None, -1):
        _, config = families.read(tiny.CONFIGS["llama"] | {"pad_token_id": found})
        assert config.pad_id is None


def test_other_names_of_a_key_count():
    _, config = families.read({"model_type": "gpt2", "hidden_size": 24, "num_hidden_layers": 2})
    assert (config.width, config.num_layers, config.num_heads) == (24, 2, 12)
    assert "hidden_size" not in config.hf_json


@pytest.mark.parametrize("name", FAMILIES)
def test_every_parameter_has_a_rule_and_a_sharding(name):
    for tied in (True, False):
        family, config = families.read(tiny.CONFIGS[name] | {"tie_word_embeddings": tied})
        for head in family.architectures:
            params = families.abstract(family, config, head, Policy()).params
            paths = families.flatten(params)
            named = {path for rule in hf.rules_of(family, config, head) for path in rule.ours}
            assert named == paths.keys()
            for path, leaf in paths.items():
                found = next(spec for regex, spec in families.PARTITION if re.search(regex, path))
                assert len(found) <= leaf.ndim, path
                large = path.endswith("kernel") or config.vocab_size in leaf.shape
                assert not large or found[0] is not None, path  # split over fsdp


def test_a_parameter_starts_by_its_path_alone():
    family, config = families.read(tiny.CONFIGS["bert"])
    deep = families.build(family, config, "mlm", Policy(), jax.random.key(0)).params
    family, config = families.read(tiny.CONFIGS["bert"] | {"num_hidden_layers": 1})
    flat = families.build(family, config, "mlm", Policy(), jax.random.key(0)).params
    blocks = deep["backbone"]["blocks"]
    jax.tree.map(np.testing.assert_array_equal, flat["backbone"]["blocks"][0], blocks[0])
    jax.tree.map(np.testing.assert_array_equal, flat["head"], deep["head"])
    kernels = [block["mlp"]["up"]["kernel"] for block in blocks.values()]
    assert not np.array_equal(kernels[0], kernels[1])


def test_what_is_made_twice_is_not_shared():
    made = *families.read(tiny.CONFIGS["bert"]), "mlm", Policy()
    first, second = families.abstract(*made), families.abstract(*made)
    assert first == second
    first.params["backbone"]["blocks"].clear()
    assert second.params["backbone"]["blocks"] and families.abstract(*made) == second


def test_graph_is_one_for_equal_configs():
    one, two = (families.read(tiny.CONFIGS["gpt2"] | {"task": task}) for task in "ab")
    graphs = [families.abstract(*made, "clm", Policy()).graphdef for made in (one, two)]
    assert graphs[0] == graphs[1] and hash(graphs[0]) == hash(graphs[1])
    assert families.spec(one[1]) == ModelSpec(
        width=32, num_layers=one[1].num_layers, num_heads=4, causal=True, vector_width=32
    )


def test_width_of_vectors():
    _, config = families.read(tiny.CONFIGS["bert"])
    config = dataclasses.replace(config, dense=(Dense(16), Dense(8)))
    assert families.spec(config).vector_width == 8
    assert families.spec(dataclasses.replace(config, dimensions=5)).vector_width == 5


@pytest.mark.parametrize(
    "model, millions",  # published sizes, the tied unembedding counted once
    [
        ("google-bert/bert-base-uncased", 109.5),
        ("bert-large-uncased", 335.2),
        ("google/bert_uncased_L-2_H-128_A-2", 4.4),
        ("distilbert-base-uncased", 67.0),
        ("roberta-base", 124.7),
        ("FacebookAI/roberta-large", 355.4),
        ("distilroberta-base", 82.2),
        ("gpt2", 124.4),
        ("gpt2-xl", 1557.6),
        ("distilgpt2", 81.9),
        ("TinyBERT_General_4L_312D", 14.4),
        ("TinyBERT_General_6L_768D", 67.0),
        ("google/mobilebert-uncased", 24.6),
        ("mpnet-base", 109.5),
        ("xlm-roberta-base", 278.3),
        ("FacebookAI/xlm-roberta-large", 560.1),
        ("electra-small-discriminator", 13.5),
        ("electra-base-discriminator", 108.9),
        ("electra-large-discriminator", 334.1),
        ("ModernBERT-base", 149.0),
        ("ettin-encoder-17m", 16.8),
        ("ettin-encoder-32m", 31.9),
        ("ettin-encoder-68m", 68.1),
        ("ettin-encoder-400m", 394.8),
        ("ettin-encoder-1b", 1028.1),
        ("phi-1", 1418.3),
        ("phi-2", 2779.7),
        ("Llama-2-7b-hf", 6738.4),
        ("Llama-3.1-8B", 8030.3),
        ("Llama-3.2-1B", 1235.8),
        ("TinyLlama-1.1B-Chat-v1.0", 1100.0),
        ("HuggingFaceTB/SmolLM2-135M", 134.5),
        ("SmolLM-360M", 361.8),
        ("Qwen/Qwen2.5-0.5B", 494.0),
        ("Qwen2-7B", 7615.6),
    ],
)
def test_presets_have_the_published_sizes(model, millions):
    family, config = families.read(blueprint.preset(model))
    # Some are counted without what only the masked-LM head has.
    bare = family.name in ("mobilebert", "modernbert", "electra")
    head = "none" if bare else next(iter(family.architectures))
    params = families.abstract(family, config, head, Policy()).params
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert count / 1e6 == pytest.approx(millions, abs=0.06)


# Parameters as the hub counts those of the safetensors files, a tied table once.
SIZES = {
    r"Llama-2-7b": 6_738_415_616,
    r"Llama-2-13b": 13_015_864_320,
    r"Llama-2-70b": 68_976_648_192,
    r"Llama-3(\.1)?-8B": 8_030_261_248,
    r"Llama-3(\.[13])?-70B": 70_553_706_496,
    r"Llama-3\.1-405B": 405_853_388_800,
    r"Llama-3\.2-1B": 1_235_814_400,
    r"Llama-3\.2-3B": 3_212_749_824,
    r"TinyLlama-1\.1B": 1_100_048_384,
    r"SmolLM2?-135M": 134_515_008,
    r"SmolLM2?-360M": 361_821_120,
    r"SmolLM2?-1\.7B": 1_711_376_384,
    r"Qwen2(\.5)?-0\.5B": 494_032_768,
    r"Qwen2(\.5)?-1\.5B": 1_543_714_304,
    r"Qwen2\.5-3B": 3_085_938_688,
    r"Qwen2(\.5)?-7B": 7_615_616_512,
    r"Qwen2\.5-14B": 14_770_033_664,
    r"Qwen2\.5-32B": 32_763_876_352,
    r"Qwen2(\.5)?-72B": 72_706_203_648,
    r"Qwen3-0\.6B": 596_049_920,
    r"Qwen3-1\.7B": 1_720_574_976,
    r"Qwen3-4B": 4_022_468_096,
    r"Qwen3-8B": 8_190_735_360,
    r"Qwen3-14B": 14_768_307_200,
    r"Qwen3-32B": 32_762_123_264,
    r"SmolLM3-3B": 3_075_098_624,
    r"gemma-3-270m": 268_098_176,
    r"gemma-3-1b": 999_885_952,
    r"gemma-3-4b": 3_880_263_168,
    r"gemma-3-12b": 11_766_034_176,
    r"gemma-3-27b": 27_009_346_304,
    r"Mistral-7B-(Instruct-)?v0\.[12]": 7_241_732_096,
    r"Mistral-7B-(Instruct-)?v0\.3": 7_248_023_552,
    r"Mistral-Nemo": 12_247_782_400,
    r"Mistral-Small-24B": 23_572_403_200,
    r"Phi-3(\.5)?-mini": 3_821_079_552,
    r"Phi-4-mini": 3_836_021_760,
    r"phi-4": 14_659_507_200,
    r"OLMo-2-0425-1B": 1_484_916_736,
    r"OLMo-2-1124-7B": 7_298_617_344,
    r"OLMo-2-1124-13B": 13_716_198_400,
    r"OLMo-2-0325-32B": 32_234_279_936,
}


def size(hf_json: dict, layers: int) -> int:
    """Parameters of a decoder with so many of its layers."""
    own = {"layer_types", "no_rope_layers"} & hf_json.keys()
    cut = {key: hf_json[key][:layers] for key in own}
    family, config = families.read(hf_json | cut | {"num_hidden_layers": layers})
    return blueprint.count(families.abstract(family, config, "clm", Policy()).params)


def test_decoders_have_exactly_the_published_sizes():
    """Their layers are alike, so two tell of all (the test above makes whole models)."""
    checked, sizes = set(), {}
    for name, hf_json in blueprint.PRESETS.items():
        for pattern in (each for each in SIZES if re.search(each, name)):
            _, config = families.read(hf_json)
            if config not in sizes:
                one, two = size(hf_json, 1), size(hf_json, 2)
                sizes[config] = one + (config.num_layers - 1) * (two - one)
            assert sizes[config] == SIZES[pattern], name
            checked.add(pattern)
    assert checked == {*SIZES}


def test_all_presets_are_readable_and_unknown_ones_refused():
    for hf_json in blueprint.PRESETS.values():
        families.read(hf_json)
    with pytest.raises(UserError, match="no built-in shape for 'gpt3'.*nearest: gpt2"):
        blueprint.preset("gpt3")
