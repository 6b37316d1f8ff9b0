"""Describes the family OLMo 2 (OLMo team 2025, arXiv:2501.00656): Llama with norms after the
sublayers instead of before them, and norms of all queries, and of all keys, at once."""

import dataclasses

from kd_jax.models import llama
from kd_jax.models.family import classes

FAMILY = dataclasses.replace(
    llama.FAMILY,
    name="olmo2",
    architectures=classes("Olmo2", "clm"),
    keys=llama.KEYS
    | {
        "vocab_size": ("vocab_size", 50304),
        "attention_bias": ("qkv_bias attention_out_bias", False),
        "pad_token_id": ("pad_id", 1),
        "rms_norm_eps": ("norm_eps", 1e-5),
    },
    fixed={"rms_norm": True, "gated": True, "mlp_bias": False, "norms": "after", "qk_norm": "all"},
    base={hf: ours for hf, ours in llama.BASE.items() if "layernorm" not in hf}
    | {
        "layers.#.self_attn.q_norm": "backbone/blocks/#/attention/q_norm",
        "layers.#.self_attn.k_norm": "backbone/blocks/#/attention/k_norm",
        "layers.#.post_attention_layernorm": "backbone/blocks/#/attention_out_norm",
        "layers.#.post_feedforward_layernorm": "backbone/blocks/#/mlp_out_norm",
    },
)
