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
