"""Describes the family Qwen3 (Yang et al. 2025, arXiv:2505.09388): Qwen2 without biases, with norms
of each head's queries and keys, and heads whose width is a size of its own."""

import dataclasses
import functools

from kd_jax.models import qwen2
from kd_jax.models.family import classes

FAMILY = dataclasses.replace(
    qwen2.FAMILY,
    name="qwen3",
    architectures=classes("Qwen3", "clm"),
    keys=qwen2.KEYS | {"attention_bias": ("qkv_bias attention_out_bias", False)},
    fixed={"rms_norm": True, "gated": True, "mlp_bias": False, "qk_norm": "each"},
    base=qwen2.FAMILY.base
    | {
        "layers.#.self_attn.q_norm": "backbone/blocks/#/attention/q_norm",
        "layers.#.self_attn.k_norm": "backbone/blocks/#/attention/k_norm",
    },
    read=functools.partial(qwen2.read, head_width=128),
)
