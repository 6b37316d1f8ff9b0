"""DistilBERT (Sanh et al. 2019, arXiv:1910.01108)."""

import jax.numpy as jnp

from kd_jax.models.bert import zero_padding_row
from kd_jax.models.encoder import Encoder, EncoderConfig
from kd_jax.models.family import (
    NOT_NEGATIVE,
    RATE,
    SIZE,
    Family,
    Fields,
    Rule,
    embedding,
    linear,
    norm,
)
from kd_jax.models.labels import read_labels


def _from_hf(fields: Fields) -> EncoderConfig:
    fields.rename(hidden_size="dim", num_attention_heads="n_heads", num_hidden_layers="n_layers")
    activation = fields.get("activation", str, "gelu")
    dropout = fields.get("dropout", RATE, 0.1)
    return EncoderConfig(
        vocab_size=fields.get("vocab_size", SIZE, 30522),
        width=fields.get("dim", SIZE, 768),
        num_layers=fields.get("n_layers", SIZE, 6),
        num_heads=fields.get("n_heads", SIZE, 12),
        ffn_width=fields.get("hidden_dim", SIZE, 3072),
        max_positions=fields.get("max_position_embeddings", SIZE, 512),
        num_types=0,
        activation=activation,
        head_activation=activation,
        norm_eps=1e-12,
        embedding_dropout=dropout,
        attention_dropout=fields.get("attention_dropout", RATE, 0.1),
        attention_out_dropout=0.0,
        mlp_dropout=dropout,
        initializer_range=fields.get("initializer_range", NOT_NEGATIVE, 0.02),
        tie_embeddings=fields.get("tie_word_embeddings", bool, True),
        pad_id=fields.get("pad_token_id", int | None, 0),
        labels=read_labels(fields),
        classifier_dropout=fields.get("seq_classif_dropout", RATE, 0.2),
        pooler="relu",
        span_dropout=fields.get("qa_dropout", RATE, 0.1),
        sinusoidal=fields.get("sinusoidal_pos_embds", bool, False),
    )


def _to_hf(config: EncoderConfig) -> dict:
    return {
        "vocab_size": config.vocab_size,
        "dim": config.width,
        "n_layers": config.num_layers,
        "n_heads": config.num_heads,
        "hidden_dim": config.ffn_width,
        "max_position_embeddings": config.max_positions,
        "activation": config.activation,
        "dropout": config.mlp_dropout,
        "attention_dropout": config.attention_dropout,
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": config.tie_embeddings,
        "pad_token_id": config.pad_id,
        "seq_classif_dropout": config.classifier_dropout,
        "qa_dropout": config.span_dropout,
        "sinusoidal_pos_embds": config.sinusoidal,
    }


def _rules(config: EncoderConfig, head: str) -> list[Rule]:
    rules = [
        *embedding("embeddings.word_embeddings", "backbone/tokens"),
        *embedding("embeddings.position_embeddings", "backbone/positions"),
        *norm("embeddings.LayerNorm", "backbone/norm"),
    ]
    for i in range(config.num_layers):
        hf, ours = f"transformer.layer.{i}", f"backbone/blocks/{i}"
        rules += [
            *linear(f"{hf}.attention.q_lin", f"{ours}/attention/q"),
            *linear(f"{hf}.attention.k_lin", f"{ours}/attention/k"),
            *linear(f"{hf}.attention.v_lin", f"{ours}/attention/v"),
            *linear(f"{hf}.attention.out_lin", f"{ours}/attention/o"),
            *norm(f"{hf}.sa_layer_norm", f"{ours}/attention_norm"),
            *linear(f"{hf}.ffn.lin1", f"{ours}/mlp/up"),
            *linear(f"{hf}.ffn.lin2", f"{ours}/mlp/down"),
            *norm(f"{hf}.output_layer_norm", f"{ours}/mlp_norm"),
        ]
    if head == "mlm":
        tied = config.tie_embeddings
        unembed = "backbone/tokens/embedding" if tied else "head/unembed"
        rules += linear("vocab_transform", "head/transform")
        rules += norm("vocab_layer_norm", "head/norm")
        rules.append(Rule("vocab_projector.weight", (unembed,), tied=tied))
        rules.append(Rule("vocab_projector.bias", ("head/bias",)))
    elif head == "classification":
        rules += linear("pre_classifier", "head/pooler")
        rules += linear("classifier", "head/classifier")
    elif head == "span":
        rules += linear("qa_outputs", "head/span")
    return rules


def _sinusoids(path, value, config):
    """HF starts positions as the sinusoids of Vaswani et al. (2017) where the config asks for it,
    and trains them like any others."""
    if path != "backbone/positions/embedding" or not config.sinusoidal:
        return zero_padding_row(path, value, config)
    rows, width = value.shape
    column = jnp.arange(width)[None]
    angle = jnp.arange(rows)[:, None] / 10000.0 ** (2 * (column // 2) / width)
    return jnp.where(column % 2 == 0, jnp.sin(angle), jnp.cos(angle)).astype(value.dtype)


FAMILY = Family(
    name="distilbert",
    prefix="distilbert.",
    architectures={
        "mlm": "DistilBertForMaskedLM",
        "classification": "DistilBertForSequenceClassification",
        "span": "DistilBertForQuestionAnswering",
        "none": "DistilBertModel",
    },
    backbone=Encoder,
    from_hf=_from_hf,
    to_hf=_to_hf,
    rules=_rules,
    ignore=(r"^embeddings\.position_ids$",),
    adjust=_sinusoids,
)
