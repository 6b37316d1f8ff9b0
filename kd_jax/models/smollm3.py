"""Describes the family SmolLM3 (Bakouch et al. 2025, huggingface.co/blog/smollm3): Llama, in which
every fourth layer has no rotary embedding (Yang et al. 2025, arXiv:2501.18795)."""

import dataclasses

from kd_jax.errors import UserError
from kd_jax.models import llama, windows
from kd_jax.models.config_json import SIZE, Fields
from kd_jax.models.family import classes
from kd_jax.models.model_config import DecoderConfig


def _read(fields: Fields, values: dict) -> dict:
    count = values["num_layers"]
    every = fields.get("no_rope_layer_interval", SIZE, 4)
    rotated = fields.get("no_rope_layers", list | tuple | None, None)  # in spite of its name
    if rotated is None:
        rotated = [int((layer + 1) % every != 0) for layer in range(count)]
    if len(rotated) < count or not {*rotated} <= {0, 1}:
        raise UserError(
            f"{fields.where}: no_rope_layers is {rotated}, want 1 or 0 for each of {count} layers"
        )
    unrotated = tuple(not each for each in rotated[:count])
    more = windows.switched(fields, count, None, lambda layer: unrotated[layer])
    return llama.read(fields, values, theta=2_000_000.0) | more | {"unrotated": unrotated}


def _write(config: DecoderConfig) -> dict:
    rotated = [int(config.rotary_of(layer) is not None) for layer in range(config.num_layers)]
    keys = {"no_rope_layers": rotated} | windows.write_switched(config)
    return llama.write(config) | keys


FAMILY = dataclasses.replace(
    llama.FAMILY,
    name="smollm3",
    architectures=classes("SmolLM3", "clm"),
    keys=llama.FAMILY.keys
    | {
        "vocab_size": ("vocab_size", 128256),
        "hidden_size": ("width", 2048),
        "num_hidden_layers": ("num_layers", 36),
        "num_attention_heads": ("num_heads", 16),
        "num_key_value_heads": ("num_kv_heads", 4),
        "max_position_embeddings": ("max_positions", 32768),
        "tie_word_embeddings": ("tie_embeddings", True),
        "pad_token_id": ("pad_id", 128004),
    },
    read=_read,
    write=_write,
)
