"""Describes the family Phi: Phi-1 (Gunasekar et al. 2023, arXiv:2306.11644), Phi-1.5 and Phi-2, in
which attention and MLP read the same normalized input, and some of a head's features are rotated.
"""

import functools

from kd_jax.models import llama
from kd_jax.models.decoder import Decoder
from kd_jax.models.family import Family, classes

DROPOUTS = {
    "embd_pdrop": ("embedding_dropout", 0.0),
    "resid_pdrop": ("mlp_dropout attention_out_dropout", 0.0),
}
FAMILY = Family(
    name="phi",
    prefix="model.",
    architectures=classes("Phi", "clm"),
    backbone=Decoder,
    keys=llama.COMMON
    | {
        "vocab_size": ("vocab_size", 51200),
        "hidden_size": ("width", 2048),
        "num_hidden_layers": ("num_layers", 24),
        "intermediate_size": ("ffn_width", 8192),
        "hidden_act": ("activation", "gelu_new"),
        "layer_norm_eps": ("norm_eps", 1e-5),
    }
    | DROPOUTS,
    only={"qk_layernorm": (False,)},
    fixed={"parallel": True, "head_bias": True},
    base={
        "embed_tokens": "backbone/tokens",
        "final_layernorm": "backbone/norm",
        "layers.#.input_layernorm": "backbone/blocks/#/attention_norm",
        "layers.#.self_attn.q_proj": "backbone/blocks/#/attention/q",
        "layers.#.self_attn.k_proj": "backbone/blocks/#/attention/k",
        "layers.#.self_attn.v_proj": "backbone/blocks/#/attention/v",
        "layers.#.self_attn.dense": "backbone/blocks/#/attention/o",
        "layers.#.mlp.fc1": "backbone/blocks/#/mlp/up",
        "layers.#.mlp.fc2": "backbone/blocks/#/mlp/down",
    },
    head={"lm_head.weight": "head/unembed", "lm_head.bias": "head/bias"},
    read=functools.partial(llama.read, share=0.5),
    write=llama.write,
    ignore=llama.IGNORE,
)
