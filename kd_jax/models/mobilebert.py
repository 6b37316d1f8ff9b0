"""Describes the family MobileBERT (Sun et al. 2020, arXiv:2004.02984)."""

from kd_jax.errors import UserError
from kd_jax.models import bert
from kd_jax.models.bottleneck import BottleneckConfig, BottleneckEncoder
from kd_jax.models.config_json import Fields
from kd_jax.models.family import Family, Rule, classes


def _read(fields: Fields, values: dict) -> dict:
    fields.json.pop("true_hidden_size", None)  # follows from the other keys
    fields.only("normalization_type", "no_norm", "layer_norm")
    _check(BottleneckConfig(**values))
    return {"pooler": "tanh" if fields.get("classifier_activation", bool, True) else None}


def _check(config: BottleneckConfig) -> None:
    """Raises UserError for sizes that do not fit together."""
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


def _rules(config: BottleneckConfig, head: str) -> list[Rule]:
    """Makes the rule of the columns of the unembedding that the token embeddings lack."""
    rules = bert.second_bias(config, head)
    if head == "mlm" and config.token_width < config.width:
        rest = ("head/rest/embedding",)
        rules.append(Rule("cls.predictions.dense.weight", rest, transpose=True))
    return rules


FAMILY = Family(
    name="mobilebert",
    prefix="mobilebert.",
    architectures=classes("MobileBert", "mlm", "classification", "span"),
    backbone=BottleneckEncoder,
    keys=bert.KEYS
    | {
        "hidden_size": ("width", 512),
        "num_hidden_layers": ("num_layers", 24),
        "num_attention_heads": ("num_heads", 4),
        "intermediate_size": ("ffn_width", 512),
        "hidden_act": ("activation head_activation", "relu"),
        "hidden_dropout_prob": ("mlp_dropout embedding_dropout attention_out_dropout", 0.0),
        "embedding_size": ("token_width", 128),
        "trigram_input": ("trigrams", True),
        "use_bottleneck": ("bottlenecks", True),
        "intra_bottleneck_size": ("bottleneck_width", 128),
        "use_bottleneck_attention": ("bottleneck_values", False),
        "key_query_shared_bottleneck": ("shared_query_key", True),
        "num_feedforward_networks": ("num_mlps", 4),
        "normalization_type": ("normalization", "no_norm"),
    },
    only=bert.ONLY,
    base=bert.BASE
    | bert.POOLER
    | {
        "embeddings.embedding_transformation": "backbone/widen",
        "encoder.layer.#.ffn.#.intermediate.dense": "backbone/blocks/#/small_mlps/#/mlp/up",
        "encoder.layer.#.ffn.#.output.dense": "backbone/blocks/#/small_mlps/#/mlp/down",
        "encoder.layer.#.ffn.#.output.LayerNorm": "backbone/blocks/#/small_mlps/#/norm",
        "encoder.layer.#.bottleneck.input.dense": "backbone/blocks/#/down/linear",
        "encoder.layer.#.bottleneck.input.LayerNorm": "backbone/blocks/#/down/norm",
        "encoder.layer.#.bottleneck.attention.dense": "backbone/blocks/#/query_key/linear",
        "encoder.layer.#.bottleneck.attention.LayerNorm": "backbone/blocks/#/query_key/norm",
        "encoder.layer.#.output.bottleneck.dense": "backbone/blocks/#/up",
        "encoder.layer.#.output.bottleneck.LayerNorm": "backbone/blocks/#/up_norm",
    },
    head=bert.HEAD,
    read=_read,
    write=lambda config: {"classifier_activation": config.pooler is not None},
    rules=_rules,
    ignore=bert.IGNORE,
)
