"""MobileBERT (Sun et al. 2020, arXiv:2004.02984)."""

from kd_jax.errors import UserError
from kd_jax.models import bert
from kd_jax.models.bottleneck import BottleneckConfig, BottleneckEncoder
from kd_jax.models.family import SIZE, Family, Fields, Rule, embedding, linear, norm


def _from_hf(fields: Fields) -> BottleneckConfig:
    defaults = {
        "hidden_size": 512,
        "num_hidden_layers": 24,
        "num_attention_heads": 4,
        "intermediate_size": 512,
        "hidden_act": "relu",
        "hidden_dropout_prob": 0.0,
    }
    fields.json = defaults | fields.json
    fields.json.pop("true_hidden_size", None)  # follows from the other keys
    shared = vars(bert.from_hf(fields)) | {
        "pooler": "tanh" if fields.get("classifier_activation", bool, True) else None
    }
    config = BottleneckConfig(
        **shared,
        token_width=fields.get("embedding_size", SIZE, 128),
        trigrams=fields.get("trigram_input", bool, True),
        bottlenecks=fields.get("use_bottleneck", bool, True),
        bottleneck_width=fields.get("intra_bottleneck_size", SIZE, 128),
        bottleneck_values=fields.get("use_bottleneck_attention", bool, False),
        shared_query_key=fields.get("key_query_shared_bottleneck", bool, True),
        num_mlps=fields.get("num_feedforward_networks", SIZE, 4),
        normalization=fields.get("normalization_type", str, "no_norm"),
    )
    fields.only("normalization_type", "no_norm", "layer_norm")
    _check(config)
    return config


def _check(config: BottleneckConfig) -> None:
    """Refuses sizes that do not make a model."""
    if config.inner_width < 1 or config.inner_width % config.num_heads:
        raise UserError(
            f"config.json: {config.num_heads} attention heads do not divide the width inside a "
            f"block, {config.inner_width}"
        )
    if not 1 <= config.token_width <= config.width:
        raise UserError(
            f"config.json: embedding_size is {config.token_width}, want 1 to the hidden_size, "
            f"{config.width}"
        )
    if config.inner_width != config.width and not (
        config.bottleneck_values or config.shared_query_key
    ):
        raise UserError(
            "config.json: queries read the bottleneck or one of their own; set "
            "use_bottleneck_attention or key_query_shared_bottleneck to true"
        )


def _to_hf(config: BottleneckConfig) -> dict:
    return bert.to_hf(config) | {
        "classifier_activation": config.pooler is not None,
        "embedding_size": config.token_width,
        "trigram_input": config.trigrams,
        "use_bottleneck": config.bottlenecks,
        "intra_bottleneck_size": config.bottleneck_width,
        "use_bottleneck_attention": config.bottleneck_values,
        "key_query_shared_bottleneck": config.shared_query_key,
        "num_feedforward_networks": config.num_mlps,
        "normalization_type": config.normalization,
    }


def _rules(config: BottleneckConfig, head: str) -> list[Rule]:
    rules = [
        *embedding("embeddings.word_embeddings", "backbone/tokens"),
        *embedding("embeddings.position_embeddings", "backbone/positions"),
        *embedding("embeddings.token_type_embeddings", "backbone/types"),
        *linear("embeddings.embedding_transformation", "backbone/widen"),
        *norm("embeddings.LayerNorm", "backbone/norm"),
    ]
    for i in range(config.num_layers):
        hf, ours = f"encoder.layer.{i}", f"backbone/blocks/{i}"
        rules += [
            *linear(f"{hf}.attention.self.query", f"{ours}/attention/q"),
            *linear(f"{hf}.attention.self.key", f"{ours}/attention/k"),
            *linear(f"{hf}.attention.self.value", f"{ours}/attention/v"),
            *_linear_and_norm(f"{hf}.attention.output", ours, "attention/o", "attention_norm"),
            *linear(f"{hf}.intermediate.dense", f"{ours}/mlp/up"),
            *_linear_and_norm(f"{hf}.output", ours, "mlp/down", "mlp_norm"),
        ]
        for j in range(config.num_mlps - 1):
            small = f"{ours}/small_mlps/{j}"
            rules += linear(f"{hf}.ffn.{j}.intermediate.dense", f"{small}/mlp/up")
            rules += _linear_and_norm(f"{hf}.ffn.{j}.output", small, "mlp/down", "norm")
        if config.bottlenecks:
            down = f"{hf}.bottleneck.input"
            rules += _linear_and_norm(down, ours, "down/linear", "down/norm")
            rules += _linear_and_norm(f"{hf}.output.bottleneck", ours, "up", "up_norm")
        if config.bottlenecks and config.shared_query_key:
            shared = f"{hf}.bottleneck.attention"
            rules += _linear_and_norm(shared, ours, "query_key/linear", "query_key/norm")
    if head == "mlm" and config.token_width < config.width:
        rest = ("head/rest/embedding",)
        rules.append(Rule("cls.predictions.dense.weight", rest, transpose=True))
    return rules + bert.head_rules(config, head)


def _linear_and_norm(hf: str, ours: str, kernel: str, scale: str) -> list[Rule]:
    """HF's modules of a dense layer and the norm after it."""
    return [*linear(f"{hf}.dense", f"{ours}/{kernel}"), *norm(f"{hf}.LayerNorm", f"{ours}/{scale}")]


FAMILY = Family(
    name="mobilebert",
    prefix="mobilebert.",
    architectures={
        "mlm": "MobileBertForMaskedLM",
        "classification": "MobileBertForSequenceClassification",
        "span": "MobileBertForQuestionAnswering",
        "none": "MobileBertModel",
    },
    backbone=BottleneckEncoder,
    from_hf=_from_hf,
    to_hf=_to_hf,
    rules=_rules,
    ignore=(r"^pooler\.", r"^embeddings\.position_ids$", r"^cls\.seq_relationship\."),
    adjust=bert.zero_padding_row,
)
