"""Qwen2 and Qwen2.5 (Yang et al. 2024, arXiv:2407.10671, 2412.15115): Llama with biases of its own.

Sliding windows are not implemented; the published models switch them off.
"""

from kd_jax.errors import UserError
from kd_jax.models import llama
from kd_jax.models.decoder import Decoder
from kd_jax.models.decoder_config import DecoderConfig
from kd_jax.models.family import Family, Fields

_DEFAULTS = {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
}


def _from_hf(fields: Fields) -> DecoderConfig:
    fields.json = _DEFAULTS | fields.json
    config = llama.from_hf(fields, dict(attention_out_bias=False, mlp_bias=False))
    _refuse_windows(fields, config)
    return config


def _refuse_windows(fields: Fields, config: DecoderConfig) -> None:
    """Raises UserError where some layer would not see all tokens of a long row."""
    layers = range(config.num_layers)
    window = fields.get("sliding_window", int | None, 4096)
    if not fields.get("use_sliding_window", bool, False):
        window = None
    first = fields.get("max_window_layers", int, 28)
    kinds = fields.get("layer_types", list | None, None)
    if kinds is None:
        sliding = window is not None and any(i >= first for i in layers)
    else:
        sliding = any(kind != "full_attention" for kind in kinds)
    if sliding and (window is None or window < config.max_tokens):
        raise UserError(
            f"config.json: layers with a sliding window of {window} tokens are not supported; set "
            f"use_sliding_window to false and remove layer_types, for rows that are no longer"
        )


def _to_hf(config: DecoderConfig) -> dict:
    return llama.to_hf(config) | {"rms_norm_eps": config.norm_eps}


FAMILY = Family(
    name="qwen2",
    prefix="model.",
    architectures={"clm": "Qwen2ForCausalLM", "none": "Qwen2Model"},
    backbone=Decoder,
    from_hf=_from_hf,
    to_hf=_to_hf,
    rules=llama.rules,
    ignore=llama.IGNORE,
    adjust=llama.zero_padding_row,
)
