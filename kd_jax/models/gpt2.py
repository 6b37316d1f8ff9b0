"""GPT-2 (Radford et al. 2019) and DistilGPT-2."""

import math

from kd_jax.models.decoder import Decoder
from kd_jax.models.decoder_config import DecoderConfig
from kd_jax.models.family import (
    NOT_NEGATIVE,
    RATE,
    SIZE,
    Family,
    Fields,
    Rule,
    block_rules,
    conv1d,
    embedding,
    norm,
)


def _from_hf(fields: Fields) -> DecoderConfig:
    fields.rename(
        hidden_size="n_embd",
        max_position_embeddings="n_positions",
        num_attention_heads="n_head",
        num_hidden_layers="n_layer",
    )
    fields.only("add_cross_attention", False)
    # reorder_and_upcast_attn is harmless: softmax is float32 here, whatever the key says.
    width, heads = fields.get("n_embd", SIZE, 768), fields.get("n_head", SIZE, 12)
    dropout = fields.get("resid_pdrop", RATE, 0.1)
    return DecoderConfig(
        vocab_size=fields.get("vocab_size", SIZE, 50257),
        width=width,
        num_layers=fields.get("n_layer", SIZE, 12),
        num_heads=heads,
        num_kv_heads=heads,
        head_width=None,
        ffn_width=fields.get("n_inner", SIZE, None) or 4 * width,
        max_positions=fields.get("n_positions", SIZE, 1024),
        activation=fields.get("activation_function", str, "gelu_new"),
        norm_eps=fields.get("layer_norm_epsilon", NOT_NEGATIVE, 1e-5),
        embedding_dropout=fields.get("embd_pdrop", RATE, 0.1),
        attention_dropout=fields.get("attn_pdrop", RATE, 0.1),
        attention_out_dropout=dropout,
        mlp_dropout=dropout,
        initializer_range=fields.get("initializer_range", NOT_NEGATIVE, 0.02),
        tie_embeddings=fields.get("tie_word_embeddings", bool, True),
        scale_scores=fields.get("scale_attn_weights", bool, True),
        scale_by_layer=fields.get("scale_attn_by_inverse_layer_idx", bool, False),
    )


def _to_hf(config: DecoderConfig) -> dict:
    return {
        "vocab_size": config.vocab_size,
        "n_embd": config.width,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": config.ffn_width,
        "n_positions": config.max_positions,
        "activation_function": config.activation,
        "layer_norm_epsilon": config.norm_eps,
        "embd_pdrop": config.embedding_dropout,
        "attn_pdrop": config.attention_dropout,
        "resid_pdrop": config.mlp_dropout,
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": config.tie_embeddings,
        "scale_attn_weights": config.scale_scores,
        "scale_attn_by_inverse_layer_idx": config.scale_by_layer,
    }


def _rules(config: DecoderConfig, head: str) -> list[Rule]:
    rules = [
        *embedding("wte", "backbone/tokens"),
        *embedding("wpe", "backbone/positions"),
        *norm("ln_f", "backbone/norm"),
    ]
    for i in range(config.num_layers):
        rules += block_rules(config.shape(i), f"h.{i}", f"backbone/blocks/{i}", _block_rules)
    if head == "clm" and config.tie_embeddings:
        rules.append(Rule("lm_head.weight", ("backbone/tokens/embedding",), tied=True))
    elif head == "clm":
        rules.append(Rule("lm_head.weight", ("head/unembed",)))
    return rules


def _block_rules(hf: str, ours: str) -> list[Rule]:
    return [
        *norm(f"{hf}.ln_1", f"{ours}/attention_norm"),
        *conv1d(f"{hf}.attn.c_attn", *(f"{ours}/attention/{name}" for name in "qkv")),
        *conv1d(f"{hf}.attn.c_proj", f"{ours}/attention/o"),
        *norm(f"{hf}.ln_2", f"{ours}/mlp_norm"),
        *conv1d(f"{hf}.mlp.c_fc", f"{ours}/mlp/up"),
        *conv1d(f"{hf}.mlp.c_proj", f"{ours}/mlp/down"),
    ]


def _scale_residuals(path, value, config):
    """What writes into the residual stream starts smaller, by the root of the number of writers."""
    if path.endswith(("attention/o/kernel", "mlp/down/kernel")):
        return value / math.sqrt(2 * config.num_layers)
    return value


FAMILY = Family(
    name="gpt2",
    prefix="transformer.",
    architectures={"clm": "GPT2LMHeadModel", "none": "GPT2Model"},
    backbone=Decoder,
    from_hf=_from_hf,
    to_hf=_to_hf,
    rules=_rules,
    ignore=(r"^h\.\d+\.attn\.(masked_)?bias$",),
    adjust=_scale_residuals,
)
