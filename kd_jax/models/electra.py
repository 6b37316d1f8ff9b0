"""Describes the family ELECTRA (Clark et al. 2020, arXiv:2003.10555): BERT with embeddings of a
width of their own; the generator's masked-LM head, the discriminator's on classes and spans."""

from kd_jax.models import bert
from kd_jax.models.config_json import SIZE
from kd_jax.models.encoder import Encoder
from kd_jax.models.family import Family, classes

FAMILY = Family(
    name="electra",
    prefix="electra.",
    architectures=classes("Electra", "mlm", "classification", "span"),
    backbone=Encoder,
    keys=bert.KEYS
    | {
        "embedding_size": ("token_width", 128, SIZE),
        "hidden_size": ("width", 256),
        "num_attention_heads": ("num_heads", 4),
        "intermediate_size": ("ffn_width", 1024),
    },
    only=bert.ONLY,
    fixed={"narrow_head": True, "pooler": "gelu", "drop_before_pooler": True},
    base=bert.BASE | {"embeddings_project": "backbone/widen"},
    head={
        "generator_predictions.dense": "head/transform",
        "generator_predictions.LayerNorm": "head/norm",
        "generator_lm_head.weight": "head/unembed",
        "generator_lm_head.bias": "head/bias",
        "classifier.dense": "head/pooler",
        "classifier.out_proj": "head/classifier",
        "qa_outputs": "head/span",
    },
    read=lambda fields, values: {"head_activation": "gelu"},  # whatever hidden_act says
    ignore=(r"^embeddings\.position_ids$", r"^discriminator_predictions\."),
)
