"""BERT (Devlin et al. 2018, arXiv:1810.04805)."""

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


def from_hf(fields: Fields) -> EncoderConfig:
    """The config of BERT; RoBERTa's is this with other defaults."""
    fields.only("position_embedding_type", "absolute", None)
    fields.only("is_decoder", False)
    fields.only("add_cross_attention", False)
    activation = fields.get("hidden_act", str, "gelu")
    dropout = fields.get("hidden_dropout_prob", RATE, 0.1)
    return EncoderConfig(
        vocab_size=fields.get("vocab_size", SIZE, 30522),
        width=fields.get("hidden_size", SIZE, 768),
        num_layers=fields.get("num_hidden_layers", SIZE, 12),
        num_heads=fields.get("num_attention_heads", SIZE, 12),
        ffn_width=fields.get("intermediate_size", SIZE, 3072),
        max_positions=fields.get("max_position_embeddings", SIZE, 512),
        num_types=fields.get("type_vocab_size", int, 2),
        activation=activation,
        head_activation=activation,
        norm_eps=fields.get("layer_norm_eps", NOT_NEGATIVE, 1e-12),
        embedding_dropout=dropout,
        attention_dropout=fields.get("attention_probs_dropout_prob", RATE, 0.1),
        attention_out_dropout=dropout,
        mlp_dropout=dropout,
        initializer_range=fields.get("initializer_range", NOT_NEGATIVE, 0.02),
        tie_embeddings=fields.get("tie_word_embeddings", bool, True),
        pad_id=fields.get("pad_token_id", int | None, 0),
        labels=read_labels(fields),
        classifier_dropout=fields.get("classifier_dropout", RATE, None),
    )


def to_hf(config: EncoderConfig) -> dict:
    """The keys of config.json that BERT and RoBERTa share."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.ffn_width,
        "max_position_embeddings": config.max_positions,
        "type_vocab_size": config.num_types,
        "hidden_act": config.activation,
        "layer_norm_eps": config.norm_eps,
        "hidden_dropout_prob": config.mlp_dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": config.tie_embeddings,
        "pad_token_id": config.pad_id,
        "classifier_dropout": config.classifier_dropout,
    }


def backbone_rules(config: EncoderConfig) -> list[Rule]:
    """The tensors of BERT's and RoBERTa's base model."""
    rules = [
        *embedding("embeddings.word_embeddings", "backbone/tokens"),
        *embedding("embeddings.position_embeddings", "backbone/positions"),
        *embedding("embeddings.token_type_embeddings", "backbone/types"),
        *norm("embeddings.LayerNorm", "backbone/norm"),
    ]
    for i in range(config.num_layers):
        hf, ours = f"encoder.layer.{i}", f"backbone/blocks/{i}"
        rules += [
            *linear(f"{hf}.attention.self.query", f"{ours}/attention/q"),
            *linear(f"{hf}.attention.self.key", f"{ours}/attention/k"),
            *linear(f"{hf}.attention.self.value", f"{ours}/attention/v"),
            *linear(f"{hf}.attention.output.dense", f"{ours}/attention/o"),
            *norm(f"{hf}.attention.output.LayerNorm", f"{ours}/attention_norm"),
            *linear(f"{hf}.intermediate.dense", f"{ours}/mlp/up"),
            *linear(f"{hf}.output.dense", f"{ours}/mlp/down"),
            *norm(f"{hf}.output.LayerNorm", f"{ours}/mlp_norm"),
        ]
    return rules


def head_rules(config: EncoderConfig, head: str) -> list[Rule]:
    """The tensors of BERT's and MobileBERT's heads."""
    if head == "mlm":
        return [
            *linear("cls.predictions.transform.dense", "head/transform"),
            *norm("cls.predictions.transform.LayerNorm", "head/norm"),
            *vocabulary_rules(config, "cls.predictions"),
        ]
    if head == "classification":
        pooler = linear("pooler.dense", "head/pooler") if config.pooler else []
        own = linear("classifier", "head/classifier")
        return [rule._replace(base=True) for rule in pooler] + own
    return linear("qa_outputs", "head/span") if head == "span" else []


def vocabulary_rules(config: EncoderConfig, hf: str) -> list[Rule]:
    """Unembedding and bias of BERT's and RoBERTa's masked-LM head, `hf`.

    HF keeps the bias under two names; untied, it is the decoder's that the model adds.
    """
    weight, bias = f"{hf}.decoder.weight", f"{hf}.decoder.bias"
    if config.tie_embeddings:
        return [
            Rule(f"{hf}.bias", ("head/bias",)),
            Rule(bias, ("head/bias",), tied=True),
            Rule(weight, ("backbone/tokens/embedding",), tied=True),
        ]
    return [
        Rule(weight, ("head/unembed",)),
        Rule(bias, ("head/bias",)),
        Rule(f"{hf}.bias", ("head/bias",)),
    ]


def zero_padding_row(path, value, config):
    """HF starts the padding token's embedding at zero."""
    if path == "backbone/tokens/embedding" and config.pad_id is not None:
        return value.at[config.pad_id].set(0.0)
    return value


FAMILY = Family(
    name="bert",
    prefix="bert.",
    architectures={
        "mlm": "BertForMaskedLM",
        "classification": "BertForSequenceClassification",
        "span": "BertForQuestionAnswering",
        "none": "BertModel",
    },
    backbone=Encoder,
    from_hf=from_hf,
    to_hf=to_hf,
    rules=lambda config, head: backbone_rules(config) + head_rules(config, head),
    ignore=(r"^pooler\.", r"^embeddings\.position_ids$", r"^cls\.seq_relationship\."),
    adjust=zero_padding_row,
)
