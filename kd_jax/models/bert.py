"""Describes the family BERT (Devlin et al. 2018, arXiv:1810.04805)."""

from kd_jax.models.encoder import Encoder
from kd_jax.models.family import Family, Rule, classes
from kd_jax.models.model_config import EncoderConfig

KEYS = {
    "vocab_size": ("vocab_size", 30522),
    "hidden_size": ("width", 768),
    "num_hidden_layers": ("num_layers", 12),
    "num_attention_heads": ("num_heads", 12),
    "intermediate_size": ("ffn_width", 3072),
    "max_position_embeddings": ("max_positions", 512),
    "type_vocab_size": ("num_types", 2, int),
    "hidden_act": ("activation head_activation", "gelu"),
    "layer_norm_eps": ("norm_eps", 1e-12),
    "hidden_dropout_prob": ("mlp_dropout embedding_dropout attention_out_dropout", 0.1),
    "attention_probs_dropout_prob": ("attention_dropout", 0.1),
    "initializer_range": ("initializer_range", 0.02),
    "tie_word_embeddings": ("tie_embeddings", True),
    "pad_token_id": ("pad_id", 0),
    "classifier_dropout": ("classifier_dropout", None),
}
ONLY = {
    "position_embedding_type": ("absolute", None),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
}
BASE = {
    "embeddings.word_embeddings": "backbone/tokens",
    "embeddings.position_embeddings": "backbone/positions",
    "embeddings.token_type_embeddings": "backbone/types",
    "embeddings.LayerNorm": "backbone/norm",
    "encoder.layer.#.attention.self.query": "backbone/blocks/#/attention/q",
    "encoder.layer.#.attention.self.key": "backbone/blocks/#/attention/k",
    "encoder.layer.#.attention.self.value": "backbone/blocks/#/attention/v",
    "encoder.layer.#.attention.output.dense": "backbone/blocks/#/attention/o",
    "encoder.layer.#.attention.output.LayerNorm": "backbone/blocks/#/attention_norm",
    "encoder.layer.#.intermediate.dense": "backbone/blocks/#/mlp/up",
    "encoder.layer.#.output.dense": "backbone/blocks/#/mlp/down",
    "encoder.layer.#.output.LayerNorm": "backbone/blocks/#/mlp_norm",
}
POOLER = {"pooler.dense": "head/pooler"}
HEAD = {
    "cls.predictions.transform.dense": "head/transform",
    "cls.predictions.transform.LayerNorm": "head/norm",
    "cls.predictions.decoder.weight": "head/unembed",
    "cls.predictions.bias": "head/bias",
    "classifier": "head/classifier",
    "qa_outputs": "head/span",
}
IGNORE = (r"^pooler\.", r"^embeddings\.position_ids$", r"^cls\.seq_relationship\.")


def second_bias(config: EncoderConfig, head: str, hf: str = "cls.predictions") -> list[Rule]:
    """Names the second HF tensor with the bias of a masked-LM head; if untied, the one that is
    used."""
    bias = Rule(f"{hf}.decoder.bias", ("head/bias",), tied=config.tie_embeddings)
    return [bias] if head == "mlm" else []


FAMILY = Family(
    name="bert",
    prefix="bert.",
    architectures=classes("Bert", "mlm", "classification", "span"),
    backbone=Encoder,
    keys=KEYS,
    only=ONLY,
    base=BASE | POOLER,
    head=HEAD,
    rules=second_bias,
    ignore=IGNORE,
)
