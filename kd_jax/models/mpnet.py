"""Describes the family MPNet (Song et al. 2020, arXiv:2004.09297): RoBERTa whose layers share a
bias of the attention scores, by the distance of a key from the query."""

import dataclasses
import functools
import math

import numpy as np

from kd_jax.models import bert, roberta
from kd_jax.models.attention import Scope
from kd_jax.models.encoder import Encoder
from kd_jax.models.family import Family, classes
from kd_jax.models.layers import Embedding
from kd_jax.models.model_config import EncoderConfig
from kd_jax.types import Batch

BUCKETS, NEAR, FAR = 32, 8, 128  # of distances: half of them to each side, NEAR for one distance


@dataclasses.dataclass(frozen=True, kw_only=True)
class MPNetConfig(EncoderConfig):
    """The sizes and settings of an MPNet, those of a RoBERTa."""

    unequal = ""  # all blocks are alike
    biased = True


class MPNetEncoder(Encoder):
    """Embeddings, biases by distance, and blocks."""

    def __init__(self, config: MPNetConfig):
        super().__init__(config)
        self.distances = Embedding(BUCKETS, config.num_heads, config.policy)

    def scope(self, batch: Batch) -> Scope:
        """Makes the blocks' scope, with the biases."""
        length = batch.tokens_BT.shape[1]
        distances = np.arange(2 * length)
        distances[length:] -= 2 * length
        bias_H2T = self.distances.embedding[...][buckets(distances)].T
        return super().scope(batch).replace(bias_H2T=bias_H2T)


def buckets(distances: np.ndarray) -> np.ndarray:
    """Finds the bucket of each distance, key minus query: near ones have their own, far ones share
    them by their logarithm (Raffel et al. 2020, "T5", arXiv:1910.10683)."""
    half, away = BUCKETS // 2, np.abs(distances)
    share = np.log(np.maximum(away, 1).astype(np.float32) / NEAR) / np.float32(math.log(FAR / NEAR))
    shared = NEAR + (share * (half - NEAR)).astype(np.int64)
    return np.where(away < NEAR, away, np.minimum(shared, half - 1)) + half * (distances > 0)


FAMILY = Family(
    name="mpnet",
    prefix="mpnet.",
    architectures=classes("MPNet", "mlm", "classification", "span"),
    backbone=MPNetEncoder,
    keys={
        key: row
        for key, row in bert.KEYS.items()
        if key not in ("type_vocab_size", "classifier_dropout", "pad_token_id")
    }
    | {"vocab_size": ("vocab_size", 30527)},
    # HF's class has these two built in.
    only={"pad_token_id": (1,), "relative_attention_num_buckets": (BUCKETS,)},
    fixed=roberta.FAMILY.fixed | {"pad_id": 1, "classifier_dropout": None},
    base={
        "embeddings.word_embeddings": "backbone/tokens",
        "embeddings.position_embeddings": "backbone/positions",
        "embeddings.LayerNorm": "backbone/norm",
        "encoder.relative_attention_bias": "backbone/distances",
        "encoder.layer.#.attention.attn.q": "backbone/blocks/#/attention/q",
        "encoder.layer.#.attention.attn.k": "backbone/blocks/#/attention/k",
        "encoder.layer.#.attention.attn.v": "backbone/blocks/#/attention/v",
        "encoder.layer.#.attention.attn.o": "backbone/blocks/#/attention/o",
        "encoder.layer.#.attention.LayerNorm": "backbone/blocks/#/attention_norm",
        "encoder.layer.#.intermediate.dense": "backbone/blocks/#/mlp/up",
        "encoder.layer.#.output.dense": "backbone/blocks/#/mlp/down",
        "encoder.layer.#.output.LayerNorm": "backbone/blocks/#/mlp_norm",
    },
    head=roberta.FAMILY.head,
    read=roberta.FAMILY.read,
    rules=functools.partial(bert.second_bias, hf="lm_head"),
    ignore=bert.IGNORE,
    adjust=roberta.FAMILY.adjust,
)
