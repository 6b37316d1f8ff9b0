"""Describes the family Phi-3, Phi-4 and Phi-4-mini (Abdin et al. 2024, arXiv:2404.14219,
2412.08905): Mistral with q, k and v in one tensor, gate and up in one, and LongRoPE."""

import dataclasses

from kd_jax.errors import UserError
from kd_jax.models import llama, mistral, phi
from kd_jax.models.config_json import SIZE, Fields
from kd_jax.models.family import classes
from kd_jax.models.model_config import DecoderConfig

ORIGINAL = "original_max_position_embeddings"


def _read(fields: Fields, values: dict) -> dict:
    keys = fields.json | {ORIGINAL: fields.get(ORIGINAL, SIZE, 4096)}
    for name in ("rope_scaling", "rope_parameters"):
        own = dict(fields.part(name).json)
        kind = own.get("rope_type", own.pop("type", "default"))
        if kind in ("su", "yarn"):  # older names
            kind = "longrope"
        if kind not in ("default", "longrope"):
            raise UserError(f"config.json: {name} of a phi3 is {kind!r}; have: default, longrope")
        keys[name] = own | {"rope_type": kind} if own else None
    more = llama.read(Fields(keys, fields.where), values, share=1.0)
    return more | mistral.everywhere(fields, values, None)


def _write(config: DecoderConfig) -> dict:
    keys = llama.write(config) | {"sliding_window": config.window}
    if config.rotary.kind == "longrope":  # as transformers 4 wants it, with three keys
        scaling = dict(keys["rope_scaling"])
        scaling = {"type": scaling.pop("rope_type")} | scaling
        keys |= {ORIGINAL: scaling.pop(ORIGINAL), "rope_scaling": scaling}
    return keys


FAMILY = dataclasses.replace(
    mistral.FAMILY,
    name="phi3",
    architectures=classes("Phi3", "clm"),
    keys=llama.COMMON
    | {
        "vocab_size": ("vocab_size", 32064),
        "hidden_size": ("width", 3072),
        "intermediate_size": ("ffn_width", 8192),
        "max_position_embeddings": ("max_positions", 4096),
        "pad_token_id": ("pad_id", 32000),
        "rms_norm_eps": ("norm_eps", 1e-5),
    }
    | phi.DROPOUTS,
    only={},
    base={
        "embed_tokens": "backbone/tokens",
        "norm": "backbone/norm",
        "layers.#.input_layernorm": "backbone/blocks/#/attention_norm",
        "layers.#.self_attn.qkv_proj": "backbone/blocks/#/attention/q,k,v",
        "layers.#.self_attn.o_proj": "backbone/blocks/#/attention/o",
        "layers.#.post_attention_layernorm": "backbone/blocks/#/mlp_norm",
        "layers.#.mlp.gate_up_proj": "backbone/blocks/#/mlp/gate,up",
        "layers.#.mlp.down_proj": "backbone/blocks/#/mlp/down",
    },
    read=_read,
    write=_write,
)
