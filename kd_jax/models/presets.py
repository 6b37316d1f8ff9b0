"""The config.json of well-known hub ids, so that planning needs no network.

`find` gives the keys that fix an architecture; weights still come from the hub. Sizes are those of
the published checkpoints.
"""

import difflib
import re

from kd_jax.errors import UserError


def _bert(vocab_size: int, layers: int, width: int, heads: int, ffn_width: int = 0) -> dict:
    return {
        "model_type": "bert",
        "vocab_size": vocab_size,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": ffn_width or 4 * width,
    }


def _roberta(layers: int, width: int, heads: int) -> dict:
    return _bert(50265, layers, width, heads) | {
        "model_type": "roberta",
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
        "layer_norm_eps": 1e-5,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }


def _distilbert(vocab_size: int) -> dict:
    return {
        "model_type": "distilbert",
        "vocab_size": vocab_size,
        "dim": 768,
        "n_layers": 6,
        "n_heads": 12,
        "hidden_dim": 3072,
    }


def _gpt2(layers: int, width: int, heads: int) -> dict:
    return {
        "model_type": "gpt2",
        "vocab_size": 50257,
        "n_embd": width,
        "n_layer": layers,
        "n_head": heads,
        "n_positions": 1024,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
    }


def _phi(width: int, layers: int, part: float) -> dict:
    return {
        "model_type": "phi",
        "vocab_size": 51200,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "partial_rotary_factor": part,
    }


def _llama(
    vocab_size: int,
    width: int,
    layers: int,
    heads: int,
    kv_heads: int,
    ffn: int,
    length: int,
    **own,
) -> dict:
    return {
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": ffn,
        "max_position_embeddings": length,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 2,
    } | own


def _llama3(width: int, layers: int, heads: int, ffn: int, factor: float = 0.0, **own) -> dict:
    """With a factor it is of the releases from 3.1, for long texts."""
    rope = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    ids = {"rope_theta": 500000.0, "bos_token_id": 128000, "eos_token_id": 128001}
    long = {"rope_scaling": rope} if factor else {}
    length = 131072 if factor else 8192
    return _llama(128256, width, layers, heads, 8, ffn, length) | ids | long | own


def _smollm(width: int, layers: int, heads: int, kv_heads: int, ffn: int, version: int) -> dict:
    theta = 10000.0 if version == 1 else 130000.0 if width == 2048 else 100000.0
    own = {"tie_word_embeddings": True, "rope_theta": theta, "bos_token_id": 0, "eos_token_id": 0}
    length = 2048 if version == 1 else 8192
    return _llama(49152, width, layers, heads, kv_heads, ffn, length) | own


def _qwen2(
    width: int, layers: int, heads: int, kv_heads: int, ffn: int, length: int, tied: bool = True
) -> dict:
    own = {
        "model_type": "qwen2",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": tied,
        "bos_token_id": 151643,
        "eos_token_id": 151643,
    }
    vocab_size = 151936 if width < 3584 else 152064
    return _llama(vocab_size, width, layers, heads, kv_heads, ffn, length) | own


_TINY_LLAMA = _llama(32000, 2048, 22, 32, 4, 5632, 2048)
_TIED = {"tie_word_embeddings": True}
_UNCASED, _CASED, _MULTILINGUAL = 30522, 28996, 119547

PRESETS = {
    "google-bert/bert-base-uncased": _bert(_UNCASED, 12, 768, 12),
    "google-bert/bert-base-cased": _bert(_CASED, 12, 768, 12),
    "google-bert/bert-base-multilingual-cased": _bert(_MULTILINGUAL, 12, 768, 12),
    "google-bert/bert-large-uncased": _bert(_UNCASED, 24, 1024, 16),
    "google-bert/bert-large-cased": _bert(_CASED, 24, 1024, 16),
    "google-bert/bert-large-uncased-whole-word-masking": _bert(_UNCASED, 24, 1024, 16),
    "google-bert/bert-large-cased-whole-word-masking": _bert(_CASED, 24, 1024, 16),
    "distilbert/distilbert-base-uncased": _distilbert(_UNCASED),
    "distilbert/distilbert-base-cased": _distilbert(_CASED),
    "distilbert/distilbert-base-multilingual-cased": _distilbert(_MULTILINGUAL),
    "FacebookAI/roberta-base": _roberta(12, 768, 12),
    "FacebookAI/roberta-large": _roberta(24, 1024, 16),
    "distilbert/distilroberta-base": _roberta(6, 768, 12),
    "openai-community/gpt2": _gpt2(12, 768, 12),
    "openai-community/gpt2-medium": _gpt2(24, 1024, 16),
    "openai-community/gpt2-large": _gpt2(36, 1280, 20),
    "openai-community/gpt2-xl": _gpt2(48, 1600, 25),
    "distilbert/distilgpt2": _gpt2(6, 768, 12),
    "microsoft/phi-1": _phi(2048, 24, 0.5),
    "microsoft/phi-1_5": _phi(2048, 24, 0.5),
    "microsoft/phi-2": _phi(2560, 32, 0.4),
    "meta-llama/Llama-2-7b-hf": _llama(32000, 4096, 32, 32, 32, 11008, 4096),
    "meta-llama/Meta-Llama-3-8B": _llama3(4096, 32, 32, 14336),
    "meta-llama/Llama-3.1-8B": _llama3(4096, 32, 32, 14336, 8.0),
    "meta-llama/Llama-3.2-1B": _llama3(2048, 16, 32, 8192, 32.0) | _TIED,
    "meta-llama/Llama-3.2-3B": _llama3(3072, 28, 24, 8192, 32.0) | _TIED,
    "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T": _TINY_LLAMA,
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": _TINY_LLAMA,
    **{
        f"HuggingFaceTB/SmolLM{'' if version == 1 else version}-{size}": _smollm(*sizes, version)
        for version in (1, 2)
        for size, sizes in {
            "135M": (576, 30, 9, 3, 1536),
            "360M": (960, 32, 15, 5, 2560),
            "1.7B": (2048, 24, 32, 32, 8192),
        }.items()
    },
    **{
        f"Qwen/Qwen{name}": _qwen2(*sizes)
        for name, sizes in {
            "2-0.5B": (896, 24, 14, 2, 4864, 131072),
            "2-1.5B": (1536, 28, 12, 2, 8960, 131072),
            "2-7B": (3584, 28, 28, 4, 18944, 131072, False),
            "2.5-0.5B": (896, 24, 14, 2, 4864, 32768),
            "2.5-1.5B": (1536, 28, 12, 2, 8960, 131072),
            "2.5-3B": (2048, 36, 16, 2, 11008, 32768),
            "2.5-7B": (3584, 28, 28, 4, 18944, 131072, False),
        }.items()
    },
    **{
        f"Qwen/Qwen{name}-Instruct": _qwen2(*sizes) | {"eos_token_id": 151645}
        for name, sizes in {
            "2.5-0.5B": (896, 24, 14, 2, 4864, 32768),
            "2.5-1.5B": (1536, 28, 12, 2, 8960, 32768),
            "2.5-3B": (2048, 36, 16, 2, 11008, 32768),
            "2.5-7B": (3584, 28, 28, 4, 18944, 32768, False),
        }.items()
    },
    # Of karpathy/tinyllamas, which is no HF checkpoint.
    "stories260K": _llama(512, 64, 5, 8, 4, 172, 512) | _TIED,
    "google/mobilebert-uncased": {
        "model_type": "mobilebert",
        "vocab_size": _UNCASED,
        "classifier_activation": False,
    },
    "huawei-noah/TinyBERT_General_4L_312D": _bert(_UNCASED, 4, 312, 12, 1200),
    "huawei-noah/TinyBERT_General_6L_768D": _bert(_UNCASED, 6, 768, 12),
    "sentence-transformers/all-MiniLM-L6-v2": _bert(_UNCASED, 6, 384, 12),
    # The small BERTs of Turc et al. (2019, arXiv:1908.08962): 64 wide heads throughout.
    **{
        f"google/bert_uncased_L-{layers}_H-{width}_A-{width // 64}": _bert(
            _UNCASED, layers, width, width // 64
        )
        for layers in (2, 4, 6, 8, 10, 12)
        for width in (128, 256, 512, 768)
    },
}


def find(model: str) -> dict:
    """The config.json of a hub id, with or without its organisation ("gpt2").

    Raises UserError with the nearest ids where there is no preset.
    """
    short = {re.sub(r"^.*/", "", name): name for name in PRESETS}
    name = model if model in PRESETS else short.get(model)
    if name is None:
        close = difflib.get_close_matches(model, [*PRESETS, *short], n=3, cutoff=0.0)
        raise UserError(
            f"no built-in shape for {model!r}; give a local folder with its config.json, or one of "
            f"{len(PRESETS)} known ids, nearest: {', '.join(close)}"
        )
    return dict(PRESETS[name])
