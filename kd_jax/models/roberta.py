"""RoBERTa (Liu et al. 2019, arXiv:1907.11692) and DistilRoBERTa: BERT with other positions."""

import dataclasses

from kd_jax.errors import UserError
from kd_jax.models import bert
from kd_jax.models.encoder import Encoder, EncoderConfig
from kd_jax.models.family import Family, Fields, Rule, linear, norm


def _from_hf(fields: Fields) -> EncoderConfig:
    defaults = {"vocab_size": 50265, "pad_token_id": 1}
    fields.json = defaults | fields.json
    config = bert.from_hf(fields)
    if config.pad_id is None:
        raise UserError("config.json: roberta counts positions from pad_token_id, which is null")
    # HF's head has gelu, whatever hidden_act says.
    return dataclasses.replace(
        config, head_activation="gelu", skip_padding=True, drop_before_pooler=True
    )


def _rules(config: EncoderConfig, head: str) -> list[Rule]:
    rules = bert.backbone_rules(config)
    if head == "mlm":
        rules += linear("lm_head.dense", "head/transform")
        rules += norm("lm_head.layer_norm", "head/norm")
        rules += bert.vocabulary_rules(config, "lm_head")
    elif head == "classification":
        rules += linear("classifier.dense", "head/pooler")
        rules += linear("classifier.out_proj", "head/classifier")
    elif head == "span":
        rules += linear("qa_outputs", "head/span")
    return rules


def _zero_padding_rows(path, value, config):
    """Padding has a position of its own, and HF starts that row at zero too."""
    if path == "backbone/positions/embedding":
        return value.at[config.pad_id].set(0.0)
    return bert.zero_padding_row(path, value, config)


FAMILY = Family(
    name="roberta",
    prefix="roberta.",
    architectures={
        "mlm": "RobertaForMaskedLM",
        "classification": "RobertaForSequenceClassification",
        "span": "RobertaForQuestionAnswering",
        "none": "RobertaModel",
    },
    backbone=Encoder,
    from_hf=_from_hf,
    to_hf=bert.to_hf,
    rules=_rules,
    ignore=(r"^pooler\.", r"^embeddings\.position_ids$"),
    adjust=_zero_padding_rows,
)
