"""Describes the family DistilBERT (Sanh et al. 2019, arXiv:1910.01108)."""

import jax.numpy as jnp

from kd_jax.models.encoder import Encoder
from kd_jax.models.family import Family, classes


def _sinusoids(path, value, config):
    """Initializes positions as sinusoids (Vaswani et al. 2017) if the config says so, as HF does;
    they are trained like any others."""
    if path != "backbone/positions/embedding" or not config.sinusoidal:
        return value
    rows, width = value.shape
    column = jnp.arange(width)[None]
    angle = jnp.arange(rows)[:, None] / 10000.0 ** (2 * (column // 2) / width)
    return jnp.where(column % 2 == 0, jnp.sin(angle), jnp.cos(angle)).astype(value.dtype)


FAMILY = Family(
    name="distilbert",
    prefix="distilbert.",
    architectures=classes("DistilBert", "mlm", "classification", "span"),
    backbone=Encoder,
    aliases={
        "hidden_size": "dim",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
    },
    keys={
        "vocab_size": ("vocab_size", 30522),
        "dim": ("width", 768),
        "n_layers": ("num_layers", 6),
        "n_heads": ("num_heads", 12),
        "hidden_dim": ("ffn_width", 3072),
        "max_position_embeddings": ("max_positions", 512),
        "activation": ("activation head_activation", "gelu"),
        "dropout": ("mlp_dropout embedding_dropout", 0.1),
        "attention_dropout": ("attention_dropout", 0.1),
        "initializer_range": ("initializer_range", 0.02),
        "tie_word_embeddings": ("tie_embeddings", True),
        "pad_token_id": ("pad_id", 0),
        "seq_classif_dropout": ("classifier_dropout", 0.2),
        "qa_dropout": ("span_dropout", 0.1),
        "sinusoidal_pos_embds": ("sinusoidal", False),
    },
    fixed={"norm_eps": 1e-12, "pooler": "relu"},
    base={
        "embeddings.word_embeddings": "backbone/tokens",
        "embeddings.position_embeddings": "backbone/positions",
        "embeddings.LayerNorm": "backbone/norm",
        "transformer.layer.#.attention.q_lin": "backbone/blocks/#/attention/q",
        "transformer.layer.#.attention.k_lin": "backbone/blocks/#/attention/k",
        "transformer.layer.#.attention.v_lin": "backbone/blocks/#/attention/v",
        "transformer.layer.#.attention.out_lin": "backbone/blocks/#/attention/o",
        "transformer.layer.#.sa_layer_norm": "backbone/blocks/#/attention_norm",
        "transformer.layer.#.ffn.lin1": "backbone/blocks/#/mlp/up",
        "transformer.layer.#.ffn.lin2": "backbone/blocks/#/mlp/down",
        "transformer.layer.#.output_layer_norm": "backbone/blocks/#/mlp_norm",
    },
    head={
        "vocab_transform": "head/transform",
        "vocab_layer_norm": "head/norm",
        "vocab_projector.weight": "head/unembed",
        "vocab_projector.bias": "head/bias",
        "pre_classifier": "head/pooler",
        "classifier": "head/classifier",
        "qa_outputs": "head/span",
    },
    ignore=(r"^embeddings\.position_ids$",),
    adjust=_sinusoids,
)
