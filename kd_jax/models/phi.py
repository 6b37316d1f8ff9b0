"""Phi-1 (Gunasekar et al. 2023, arXiv:2306.11644), Phi-1.5 and Phi-2: attention and MLP read one
layer norm and are added to the residual together; a part of each head's features is rotated."""

from kd_jax.models import llama, rotary
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
    embedding,
    linear,
    norm,
)


def _from_hf(fields: Fields) -> DecoderConfig:
    fields.only("qk_layernorm", False)
    heads = fields.get("num_attention_heads", SIZE, 32)
    max_positions = fields.get("max_position_embeddings", SIZE, 2048)
    dropout = fields.get("resid_pdrop", RATE, 0.0)
    return DecoderConfig(
        vocab_size=fields.get("vocab_size", SIZE, 51200),
        width=fields.get("hidden_size", SIZE, 2048),
        num_layers=fields.get("num_hidden_layers", SIZE, 24),
        num_heads=heads,
        num_kv_heads=llama.kv_heads(fields, heads),
        head_width=fields.get("head_dim", SIZE, None),
        ffn_width=fields.get("intermediate_size", SIZE, 8192),
        max_positions=max_positions,
        activation=fields.get("hidden_act", str, "gelu_new"),
        norm_eps=fields.get("layer_norm_eps", NOT_NEGATIVE, 1e-5),
        embedding_dropout=fields.get("embd_pdrop", RATE, 0.0),
        attention_dropout=fields.get("attention_dropout", RATE, 0.0),
        attention_out_dropout=dropout,
        mlp_dropout=dropout,
        initializer_range=fields.get("initializer_range", NOT_NEGATIVE, 0.02),
        tie_embeddings=fields.get("tie_word_embeddings", bool, False),
        rotary=rotary.read(fields, max_positions, part=0.5),
        parallel=True,
        head_bias=True,
        pad_id=llama.pad_id(fields),
    )


def _to_hf(config: DecoderConfig) -> dict:
    own = {
        "layer_norm_eps": config.norm_eps,
        "embd_pdrop": config.embedding_dropout,
        "resid_pdrop": config.mlp_dropout,
    }
    return llama.to_hf(config) | own


def _block_rules(hf: str, ours: str) -> list[Rule]:
    return [
        *norm(f"{hf}.input_layernorm", f"{ours}/attention_norm"),
        *linear(f"{hf}.self_attn.q_proj", f"{ours}/attention/q"),
        *linear(f"{hf}.self_attn.k_proj", f"{ours}/attention/k"),
        *linear(f"{hf}.self_attn.v_proj", f"{ours}/attention/v"),
        *linear(f"{hf}.self_attn.dense", f"{ours}/attention/o"),
        *linear(f"{hf}.mlp.fc1", f"{ours}/mlp/up"),
        *linear(f"{hf}.mlp.fc2", f"{ours}/mlp/down"),
    ]


def _rules(config: DecoderConfig, head: str) -> list[Rule]:
    rules = embedding("embed_tokens", "backbone/tokens")
    for i in range(config.num_layers):
        rules += block_rules(config.shape(i), f"layers.{i}", f"backbone/blocks/{i}", _block_rules)
    rules += norm("final_layernorm", "backbone/norm")
    return rules + llama.unembedding_rules(config, head)


FAMILY = Family(
    name="phi",
    prefix="model.",
    architectures={"clm": "PhiForCausalLM", "none": "PhiModel"},
    backbone=Decoder,
    from_hf=_from_hf,
    to_hf=_to_hf,
    rules=_rules,
    ignore=llama.IGNORE,
    adjust=llama.zero_padding_row,
)
