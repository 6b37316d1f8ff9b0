"""Describes the family RoBERTa (Liu et al. 2019, arXiv:1907.11692), with DistilRoBERTa: BERT with
positions that start after the padding id."""

import functools

from kd_jax.errors import UserError
from kd_jax.models import bert
from kd_jax.models.config_json import Fields
from kd_jax.models.encoder import Encoder
from kd_jax.models.family import Family, classes


def _read(fields: Fields, values: dict) -> dict:
    if values["pad_id"] is None:
        raise UserError("config.json: positions are counted from pad_token_id, which is null")
    return {"head_activation": "gelu"}  # whatever hidden_act says


def _zero_padding_position(path, value, config):
    """Initializes the position embedding of padding to zero, as HF does."""
    return value.at[config.pad_id].set(0.0) if path == "backbone/positions/embedding" else value


FAMILY = Family(
    name="roberta",
    prefix="roberta.",
    architectures=classes("Roberta", "mlm", "classification", "span"),
    backbone=Encoder,
    keys=bert.KEYS | {"vocab_size": ("vocab_size", 50265), "pad_token_id": ("pad_id", 1)},
    only=bert.ONLY,
    fixed={"skip_padding": True, "drop_before_pooler": True},
    base=bert.BASE,
    head={
        "lm_head.dense": "head/transform",
        "lm_head.layer_norm": "head/norm",
        "lm_head.decoder.weight": "head/unembed",
        "lm_head.bias": "head/bias",
        "classifier.dense": "head/pooler",
        "classifier.out_proj": "head/classifier",
        "qa_outputs": "head/span",
    },
    read=_read,
    rules=functools.partial(bert.second_bias, hf="lm_head"),
    ignore=bert.IGNORE,
    adjust=_zero_padding_position,
)
