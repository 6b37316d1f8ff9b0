"""Describes the family Qwen2 and Qwen2.5 (Yang et al. 2024, arXiv:2407.10671, 2412.15115): Llama
with biases.

Sliding windows are not implemented; the published models switch them off.
"""

from kd_jax.errors import UserError
from kd_jax.models import llama
from kd_jax.models.config_json import Fields
from kd_jax.models.decoder import Decoder
from kd_jax.models.family import Family, classes


def _read(fields: Fields, values: dict) -> dict:
    more = llama.read(fields, values)
    _refuse_windows(fields, values["num_layers"], more["rotary"].max_tokens)
    return more


def _refuse_windows(fields: Fields, num_layers: int, max_tokens: int) -> None:
    """Raises UserError if a sliding window would hide tokens of a long row from some layer."""
    window = fields.get("sliding_window", int | None, 4096)
    if not fields.get("use_sliding_window", bool, False):
        window = None
    first = fields.get("max_window_layers", int, 28)
    kinds = fields.get("layer_types", list | None, None)
    if kinds is None:
        sliding = window is not None and first < num_layers
    else:
        sliding = any(kind != "full_attention" for kind in kinds)
    if sliding and (window is None or window < max_tokens):
        raise UserError(
            f"config.json: layers with a sliding window of {window} tokens are not supported; set "
            f"use_sliding_window to false and remove layer_types, for rows that are no longer"
        )


FAMILY = Family(
    name="qwen2",
    prefix="model.",
    architectures=classes("Qwen2", "clm"),
    backbone=Decoder,
    keys=llama.KEYS
    | {
        "vocab_size": ("vocab_size", 151936),
        "intermediate_size": ("ffn_width", 22016),
        "num_key_value_heads": ("num_kv_heads", 32),
        "max_position_embeddings": ("max_positions", 32768),
    },
    fixed={"rms_norm": True, "gated": True, "attention_out_bias": False, "mlp_bias": False},
    base=llama.BASE,
    head={"lm_head.weight": "head/unembed"},
    read=_read,
    write=llama.write,
    ignore=llama.IGNORE,
)
