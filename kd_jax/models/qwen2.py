"""Describes the family Qwen2 and Qwen2.5 (Yang et al. 2024, arXiv:2407.10671, 2412.15115): Llama
with biases, and windows from some layer on, which the published models switch off."""

import dataclasses

from kd_jax.models import llama, windows
from kd_jax.models.config_json import Fields
from kd_jax.models.family import classes
from kd_jax.models.model_config import DecoderConfig

KEYS = llama.KEYS | {
    "vocab_size": ("vocab_size", 151936),
    "intermediate_size": ("ffn_width", 22016),
    "num_key_value_heads": ("num_kv_heads", 32),
    "max_position_embeddings": ("max_positions", 32768),
}


def read(fields: Fields, values: dict, head_width: int | None = None) -> dict:
    """Reads what `llama.read` does, and windows."""
    first = fields.get("max_window_layers", int, 28)
    more = windows.switched(fields, values["num_layers"], 4096, lambda layer: layer >= first)
    return llama.read(fields, values, head_width=head_width) | more


def write(config: DecoderConfig) -> dict:
    """Writes the keys that `read` reads."""
    return llama.write(config) | windows.write_switched(config)


FAMILY = dataclasses.replace(
    llama.FAMILY,
    name="qwen2",
    architectures=classes("Qwen2", "clm"),
    keys=KEYS,
    fixed=llama.FAMILY.fixed | {"attention_out_bias": False, "mlp_bias": False},
    read=read,
    write=write,
)
