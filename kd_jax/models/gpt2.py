"""Describes the family GPT-2 (Radford et al. 2019), with DistilGPT-2."""

import math

from kd_jax.models.config_json import Fields
from kd_jax.models.decoder import Decoder
from kd_jax.models.family import Family, classes


def _read(fields: Fields, values: dict) -> dict:
    # reorder_and_upcast_attn is harmless: softmax is float32 here, whatever the key says.
    return {"ffn_width": values["ffn_width"] or 4 * values["width"]}


def _scale_residuals(path, value, config):
    """Divides initial matrices that write to the residual stream by the root of their number."""
    if path.endswith(("attention/o/kernel", "mlp/down/kernel")):
        return value / math.sqrt(2 * config.num_layers)
    return value


FAMILY = Family(
    name="gpt2",
    prefix="transformer.",
    architectures=classes("GPT2", "clm") | {"clm": "GPT2LMHeadModel"},
    backbone=Decoder,
    aliases={
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
    },
    keys={
        "vocab_size": ("vocab_size", 50257),
        "n_embd": ("width", 768),
        "n_layer": ("num_layers", 12),
        "n_head": ("num_heads num_kv_heads", 12),
        "n_inner": ("ffn_width", None),
        "n_positions": ("max_positions", 1024),
        "activation_function": ("activation", "gelu_new"),
        "layer_norm_epsilon": ("norm_eps", 1e-5),
        "embd_pdrop": ("embedding_dropout", 0.1),
        "attn_pdrop": ("attention_dropout", 0.1),
        "resid_pdrop": ("mlp_dropout attention_out_dropout", 0.1),
        "initializer_range": ("initializer_range", 0.02),
        "tie_word_embeddings": ("tie_embeddings", True),
        "scale_attn_weights": ("scale_scores", True),
        "scale_attn_by_inverse_layer_idx": ("scale_by_layer", False),
    },
    only={"add_cross_attention": (False,)},
    base={
        "wte": "backbone/tokens",
        "wpe": "backbone/positions",
        "ln_f": "backbone/norm",
        "h.#.ln_1": "backbone/blocks/#/attention_norm",
        "h.#.attn.c_attn": "backbone/blocks/#/attention/q,k,v",
        "h.#.attn.c_proj": "backbone/blocks/#/attention/o",
        "h.#.ln_2": "backbone/blocks/#/mlp_norm",
        "h.#.mlp.c_fc": "backbone/blocks/#/mlp/up",
        "h.#.mlp.c_proj": "backbone/blocks/#/mlp/down",
    },
    head={"lm_head.weight": "head/unembed"},
    read=_read,
    conv1d=r"\.c_\w+\.weight$",
    ignore=(r"^h\.\d+\.attn\.(masked_)?bias$",),
    adjust=_scale_residuals,
)
