"""Describes the family Llama 2 and 3 (Touvron et al. 2023, arXiv:2307.09288; Dubey et al. 2024,
arXiv:2407.21783), with TinyLlama and SmolLM, which have the same architecture."""

from kd_jax.models import rotary
from kd_jax.models.config_json import SIZE, Fields
from kd_jax.models.decoder import Decoder
from kd_jax.models.family import Family, classes
from kd_jax.models.model_config import DecoderConfig

COMMON = {  # of Llama and its successors
    "vocab_size": ("vocab_size", 32000),
    "hidden_size": ("width", 4096),
    "num_hidden_layers": ("num_layers", 32),
    "num_attention_heads": ("num_heads", 32),
    "num_key_value_heads": ("num_kv_heads", None),
    "intermediate_size": ("ffn_width", 11008),
    "max_position_embeddings": ("max_positions", 2048),
    "hidden_act": ("activation", "silu"),
    "attention_dropout": ("attention_dropout", 0.0),
    "initializer_range": ("initializer_range", 0.02),
    "tie_word_embeddings": ("tie_embeddings", False),
    "pad_token_id": ("pad_id", None),
}
KEYS = COMMON | {"rms_norm_eps": ("norm_eps", 1e-6)}
BASE = {
    "embed_tokens": "backbone/tokens",
    "norm": "backbone/norm",
    "layers.#.input_layernorm": "backbone/blocks/#/attention_norm",
    "layers.#.self_attn.q_proj": "backbone/blocks/#/attention/q",
    "layers.#.self_attn.k_proj": "backbone/blocks/#/attention/k",
    "layers.#.self_attn.v_proj": "backbone/blocks/#/attention/v",
    "layers.#.self_attn.o_proj": "backbone/blocks/#/attention/o",
    "layers.#.post_attention_layernorm": "backbone/blocks/#/mlp_norm",
    "layers.#.mlp.gate_proj": "backbone/blocks/#/mlp/gate",
    "layers.#.mlp.up_proj": "backbone/blocks/#/mlp/up",
    "layers.#.mlp.down_proj": "backbone/blocks/#/mlp/down",
}
# Old checkpoints hold what follows from config.json.
IGNORE = (r"^layers\.\d+\.self_attn\.rotary_emb\.inv_freq$",)


def read(
    fields: Fields,
    values: dict,
    *,
    share: float | None = None,
    theta: float = 10_000.0,
    head_width: int | None = None,
) -> dict:
    """Reads the rotary embedding and optional keys; `share` and `theta` as in `rotary.read`,
    `head_width` is the default of head_dim."""
    pad_id = values["pad_id"]
    return {
        "num_kv_heads": values["num_kv_heads"] or values["num_heads"],
        "head_width": fields.get("head_dim", SIZE, head_width),
        "pad_id": None if pad_id is None or pad_id < 0 else pad_id,  # some files have -1 for none
        "rotary": rotary.read(fields, values["max_positions"], share, theta),
    }


def write(config: DecoderConfig) -> dict:
    """Writes the keys that `read` reads."""
    head_dim = {} if config.head_width is None else {"head_dim": config.head_width}
    return head_dim | config.rotary.to_hf()


FAMILY = Family(
    name="llama",
    prefix="model.",
    architectures=classes("Llama", "clm"),
    backbone=Decoder,
    keys=KEYS
    | {
        "attention_bias": ("qkv_bias attention_out_bias", False),
        "mlp_bias": ("mlp_bias", False),
    },
    fixed={"rms_norm": True, "gated": True},
    base=BASE,
    head={"lm_head.weight": "head/unembed"},
    read=read,
    write=write,
    ignore=IGNORE,
)
