"""Llama 2 and 3 (Touvron et al. 2023, arXiv:2307.09288; Dubey et al. 2024, arXiv:2407.21783), and
what shares their architecture: TinyLlama, SmolLM."""

from kd_jax.models import rotary
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


def from_hf(fields: Fields, own: dict) -> DecoderConfig:
    """The config of Llama or of Qwen2, which differ in `own`: the biases."""
    heads = fields.get("num_attention_heads", SIZE, 32)
    max_positions = fields.get("max_position_embeddings", SIZE, 2048)
    return DecoderConfig(
        vocab_size=fields.get("vocab_size", SIZE, 32000),
        width=fields.get("hidden_size", SIZE, 4096),
        num_layers=fields.get("num_hidden_layers", SIZE, 32),
        num_heads=heads,
        num_kv_heads=kv_heads(fields, heads),
        head_width=fields.get("head_dim", SIZE, None),
        ffn_width=fields.get("intermediate_size", SIZE, 11008),
        max_positions=max_positions,
        activation=fields.get("hidden_act", str, "silu"),
        norm_eps=fields.get("rms_norm_eps", NOT_NEGATIVE, 1e-6),
        embedding_dropout=0.0,
        attention_dropout=fields.get("attention_dropout", RATE, 0.0),
        attention_out_dropout=0.0,
        mlp_dropout=0.0,
        initializer_range=fields.get("initializer_range", NOT_NEGATIVE, 0.02),
        tie_embeddings=fields.get("tie_word_embeddings", bool, False),
        rotary=rotary.read(fields, max_positions),
        rms_norm=True,
        gated=True,
        pad_id=pad_id(fields),
        **own,
    )


def kv_heads(fields: Fields, num_heads: int) -> int:
    """As many as heads where the key is missing or null."""
    found = fields.get("num_key_value_heads", SIZE, None)
    return num_heads if found is None else found


def pad_id(fields: Fields) -> int | None:
    """Some files have -1 for none."""
    found = fields.get("pad_token_id", int | None, None)
    return None if found is None or found < 0 else found


def _from_hf(fields: Fields) -> DecoderConfig:
    bias = fields.get("attention_bias", bool, False)
    mlp_bias = fields.get("mlp_bias", bool, False)
    return from_hf(fields, dict(qkv_bias=bias, attention_out_bias=bias, mlp_bias=mlp_bias))


def to_hf(config: DecoderConfig) -> dict:
    """The keys of config.json that Llama, Qwen2 and Phi share."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "intermediate_size": config.ffn_width,
        "max_position_embeddings": config.max_positions,
        "hidden_act": config.activation,
        "attention_dropout": config.attention_dropout,
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": config.tie_embeddings,
        "pad_token_id": config.pad_id,
        **({} if config.head_width is None else {"head_dim": config.head_width}),
        **config.rotary.to_hf(),
    }


def _to_hf(config: DecoderConfig) -> dict:
    own = {
        "rms_norm_eps": config.norm_eps,
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
    }
    return to_hf(config) | own


def rules(config: DecoderConfig, head: str) -> list[Rule]:
    """The tensors of Llama and Qwen2."""

    def own(hf: str, ours: str) -> list[Rule]:
        attention, mlp = f"{hf}.self_attn", f"{hf}.mlp"
        qkv, out = config.qkv_bias, config.attention_out_bias
        return [
            *norm(f"{hf}.input_layernorm", f"{ours}/attention_norm", bias=False),
            *linear(f"{attention}.q_proj", f"{ours}/attention/q", bias=qkv),
            *linear(f"{attention}.k_proj", f"{ours}/attention/k", bias=qkv),
            *linear(f"{attention}.v_proj", f"{ours}/attention/v", bias=qkv),
            *linear(f"{attention}.o_proj", f"{ours}/attention/o", bias=out),
            *norm(f"{hf}.post_attention_layernorm", f"{ours}/mlp_norm", bias=False),
            *linear(f"{mlp}.gate_proj", f"{ours}/mlp/gate", bias=config.mlp_bias),
            *linear(f"{mlp}.up_proj", f"{ours}/mlp/up", bias=config.mlp_bias),
            *linear(f"{mlp}.down_proj", f"{ours}/mlp/down", bias=config.mlp_bias),
        ]

    found = embedding("embed_tokens", "backbone/tokens")
    for i in range(config.num_layers):
        found += block_rules(config.shape(i), f"layers.{i}", f"backbone/blocks/{i}", own)
    found += norm("norm", "backbone/norm", bias=False)
    return found + unembedding_rules(config, head)


def unembedding_rules(config: DecoderConfig, head: str) -> list[Rule]:
    """The tensors of a causal model's head, at `lm_head`."""
    if head != "clm":
        return []
    bias = [Rule("lm_head.bias", ("head/bias",))] if config.head_bias else []
    if config.tie_embeddings:
        return [Rule("lm_head.weight", ("backbone/tokens/embedding",), tied=True), *bias]
    return [Rule("lm_head.weight", ("head/unembed",)), *bias]


def zero_padding_row(path, value, config):
    """HF starts the padding token's embedding at zero."""
    if path == "backbone/tokens/embedding" and config.pad_id is not None:
        return value.at[config.pad_id].set(0.0)
    return value


# Old checkpoints hold what follows from config.json.
IGNORE = (r"^layers\.\d+\.self_attn\.rotary_emb\.inv_freq$",)

FAMILY = Family(
    name="llama",
    prefix="model.",
    architectures={"clm": "LlamaForCausalLM", "none": "LlamaModel"},
    backbone=Decoder,
    from_hf=_from_hf,
    to_hf=_to_hf,
    rules=rules,
    ignore=IGNORE,
    adjust=zero_padding_row,
)
