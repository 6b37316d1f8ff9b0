"""Describes the text models of the family Gemma 3 (Gemma team 2025, arXiv:2503.19786): norms before
and after the sublayers, norms of queries and keys, and windows in five of six layers, which have
a rotary embedding of their own."""

import dataclasses

from kd_jax.models import qwen3, windows
from kd_jax.models.config_json import SIZE, Fields
from kd_jax.models.family import classes
from kd_jax.models.model_config import DecoderConfig

THETAS = {  # by the kind of layer: the key of theta, and its default
    windows.FULL: ("rope_theta", 1_000_000.0),
    windows.SLIDING: ("rope_local_base_freq", 10_000.0),
}


def _read(fields: Fields, values: dict) -> dict:
    every = fields.get("sliding_window_pattern", SIZE, 6)
    return {
        "head_width": fields.get("head_dim", SIZE, 256),
        **windows.read_rotaries(fields, values["max_positions"], THETAS, scaled=[windows.FULL]),
        **windows.layers(
            fields,
            values["num_layers"],
            windows.size(fields, 4096),
            lambda layer: (layer + 1) % every != 0,
        ),
    }


def _write(config: DecoderConfig) -> dict:
    return {
        "head_dim": config.head_width,
        "rope_scaling": config.rotary.to_hf()["rope_scaling"],
        **windows.layer_types(config),
        **windows.write_rotaries(config, THETAS),
        **({} if config.window is None else {"sliding_window": config.window}),
    }


FAMILY = dataclasses.replace(
    qwen3.FAMILY,
    name="gemma3_text",
    architectures=classes("Gemma3", "clm") | {"none": "Gemma3TextModel"},
    keys={key: row for key, row in qwen3.FAMILY.keys.items() if key != "hidden_act"}
    | {
        "vocab_size": ("vocab_size", 262208),
        "hidden_size": ("width", 2304),
        "num_hidden_layers": ("num_layers", 26),
        "num_attention_heads": ("num_heads", 8),
        "num_key_value_heads": ("num_kv_heads", 4),
        "intermediate_size": ("ffn_width", 9216),
        "max_position_embeddings": ("max_positions", 131072),
        "hidden_activation": ("activation", "gelu_pytorch_tanh"),
        "tie_word_embeddings": ("tie_embeddings", True),
        "pad_token_id": ("pad_id", 0),
        "query_pre_attn_scalar": ("score_width", 256, SIZE),
    },
    only={
        "final_logit_softcapping": (None,),
        "attn_logit_softcapping": (None,),
        "use_bidirectional_attention": (False, None),
    },
    fixed=qwen3.FAMILY.fixed | {"offset_norms": True, "norms": "both", "scale_embeddings": True},
    base=qwen3.FAMILY.base
    | {
        "layers.#.post_attention_layernorm": "backbone/blocks/#/attention_out_norm",
        "layers.#.pre_feedforward_layernorm": "backbone/blocks/#/mlp_norm",
        "layers.#.post_feedforward_layernorm": "backbone/blocks/#/mlp_out_norm",
    },
    read=_read,
    write=_write,
)
