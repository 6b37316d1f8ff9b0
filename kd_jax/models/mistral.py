"""Describes the family Mistral (Jiang et al. 2023, arXiv:2310.06825): Llama with a sliding window
in all layers, which later models have no more."""

import dataclasses

from kd_jax.models import llama, windows
from kd_jax.models.config_json import Fields
from kd_jax.models.family import classes
from kd_jax.models.model_config import DecoderConfig


def _read(fields: Fields, values: dict) -> dict:
    return llama.read(fields, values) | everywhere(fields, values, 4096)


def everywhere(fields: Fields, values: dict, default: int | None) -> dict:
    """Reads the window that all layers have, if any."""
    window = windows.size(fields, default)
    if window is None:
        return {}
    return {"window": window, "windowed": (True,) * values["num_layers"]}


def _write(config: DecoderConfig) -> dict:
    return llama.write(config) | {"sliding_window": config.window}


FAMILY = dataclasses.replace(
    llama.FAMILY,
    name="mistral",
    architectures=classes("Mistral", "clm"),
    keys=llama.KEYS
    | {
        "intermediate_size": ("ffn_width", 14336),
        "num_key_value_heads": ("num_kv_heads", 8),
        "max_position_embeddings": ("max_positions", 131072),
    },
    only={"layer_types": (None,)},
    fixed={
        "rms_norm": True,
        "gated": True,
        "qkv_bias": False,
        "attention_out_bias": False,
        "mlp_bias": False,
    },
    read=_read,
    write=_write,
)
