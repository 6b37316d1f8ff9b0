"""Defines the types that the layers of kd_jax share: batches, model outputs, ratios.

Shape letters, used as suffixes of array names (`logits_BTV`):

    B batch rows      T tokens of a row       D model width      V vocabulary
    H heads           K width of a head       F feed-forward     L layers
    P masked slots    N rows of a flat array  C rows of a chunk, or classes
    G heads of keys and values, which neighbors among H share
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx, struct

from kd_jax import axes

Array = jax.Array
Params = dict[str, Any]  # nested dicts of arrays


class Encoding(struct.PyTreeNode):
    """Holds the rows of a batch as another tokenizer encodes them; T differs from the batch's."""

    tokens_BT: Array  # int32
    mask_BT: Array  # float32
    types_BT: Array | None = None  # int32


class StoredLogits(struct.PyTreeNode):
    """Holds stored logits for each label of a batch: all of them, the K largest with their ids and
    the one value that all others share, or K ids alone, drawn by their probabilities. Rows on disk
    have no axis B."""

    values_BPK: Array | None  # float32; without ids K is V, or the number of classes
    ids_BPK: Array | None = None  # int32
    rest_BP: Array | None = None  # float32


class Batch(struct.PyTreeNode):
    """Holds the rows of one step. Labels are already shifted: `labels` belong to the logits there.

    With `positions_BP`, labels and weights are (B, P) and belong to those tokens of the row
    (masked language modelling); without it a language model's are (B, T), one for every token.
    Heads that predict once a row have as many labels a row as outputs: (B, 1) classes (float32
    numbers for a regression), (B, 2) first and last token of a span.

    With `segments_BT`, which only decoders read, a row holds several continuations of one
    beginning: the beginning is segment 0 and comes first; segments 1, 2, ... follow, and each of
    their tokens sees segment 0 and its own segment (models/decoder.py).
    """

    ids_B: Array  # int32, the example's index in its dataset; -1 for rows that fill a batch up
    tokens_BT: Array  # int32
    mask_BT: Array  # float32, 1 for tokens, 0 for padding
    labels: Array  # int32, (B, P) or (B, T); float32 for a regression
    weights: Array  # float32 like labels, 0 where nothing is supervised
    positions_BP: Array | None = None  # int32
    types_BT: Array | None = None  # int32 token types of encoders; None means all zero
    segments_BT: Array | None = None  # int32; None means one row of text
    teacher_inputs: tuple[Encoding, ...] = ()  # what teachers with other tokenizers read
    stored: dict[str, StoredLogits] | None = None  # by model: teacher, others
    # float32 like labels: the log-probability of each under the model that wrote it, at T = 1
    written: Array | None = None

    def dense(self) -> Batch:
        """Returns the batch with a label and a weight for every token, (B, T) instead of (B, P)."""
        if self.positions_BP is None:
            return self
        rows_B1 = jnp.arange(self.tokens_BT.shape[0])[:, None]
        # Unused slots carry weight 0 and may repeat a position, so both are added, not set.
        used_BP = (self.weights > 0).astype(self.labels.dtype)
        labels_BT = jnp.zeros_like(self.tokens_BT).at[rows_B1, self.positions_BP]
        weights_BT = jnp.zeros_like(self.mask_BT).at[rows_B1, self.positions_BP]
        return self.replace(
            positions_BP=None,
            labels=labels_BT.add(self.labels * used_BP),
            weights=weights_BT.add(self.weights),
        )


class Heads(struct.PyTreeNode):
    """Holds queries, keys and values of one layer; q is scaled already. G divides H: each group of
    H / G neighboring query heads shares a key and value head."""

    q_BTHK: Array
    k_BTGK: Array
    v_BTGK: Array

    def spread(self) -> Heads:
        """Repeats keys and values so that every query head has its own, (B, T, H, K)."""
        shared = self.q_BTHK.shape[2] // self.k_BTGK.shape[2]
        if shared == 1:
            return self
        return Heads(self.q_BTHK, *(jnp.repeat(x, shared, 2) for x in (self.k_BTGK, self.v_BTGK)))


class ModelOutput(struct.PyTreeNode):
    """Holds a model's output. Logits are features times the unembedding, computed only on request;
    for heads with few classes, `unembed_VD` is None and the features are the logits.

    On a mesh the unembedding and its bias may be this device's part of the ids (`axes.VOCAB`); rows
    beyond `vocab_size` belong to no id.
    """

    features: Array  # (B, P, D) at the batch's positions, or (B, T, D) where it has none
    unembed_VD: Array | None
    bias_V: Array | None
    hidden: tuple[Array, ...] = ()  # L + 1 arrays (B, T, D), hidden[0] is the embedding output
    attention: tuple[Heads, ...] = ()  # L, first layer first; unused ones cost nothing
    # ids of the model; None: as many as the unembedding has rows
    vocab_size: int | None = struct.field(pytree_node=False, default=None)

    @property
    def logits(self) -> Array:
        """Computes all logits in float32, (..., V). Losses must not: objectives/vocab.py computes
        them in chunks."""
        features, unembed_VD, bias_V = self.whole()
        if unembed_VD is None:
            return features.astype(jnp.float32)
        operands = (x.astype(jnp.float32) for x in (features, unembed_VD))
        logits = jnp.einsum("...d,vd->...v", *operands, precision="highest")
        if bias_V is None:
            return logits
        return logits + jax.lax.expand_dims(bias_V.astype(jnp.float32), range(logits.ndim - 1))

    def whole(self) -> tuple[Array, Array | None, Array | None]:
        """Returns features, and unembedding and bias of all ids, gathered if they are parts."""
        tables = (self.unembed_VD, self.bias_V)
        if self.unembed_VD is not None and self.vocab_size is not None:
            tables = (x if x is None else axes.whole_table(x, self.vocab_size) for x in tables)
        return self.features, *tables


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """Describes the properties of a model that objectives may use."""

    width: int
    num_layers: int
    num_heads: int = 1  # of every layer; 0 where layers differ
    causal: bool = False  # a token sees those before it, not those after it
    biased: bool = False  # attention scores are more than products of queries and keys
    vector_width: int = 0  # of the vectors of its embedding head


class Counted(NamedTuple):
    """Holds what determines a model's FLOPs (metrics/flops.py)."""

    params: Params  # {"backbone", "head"}, arrays or their shapes; GPT-2 has no head
    windows: Sequence[int | None] = ()  # tokens that a token sees in each layer; None, (): all
    unembeds: bool = True  # whether a language model's head ends it


class Ratio(struct.PyTreeNode):
    """Holds a weighted sum and its weight; sums of ratios are divided only once, when read."""

    total: Array
    weight: Array

    def __add__(self, other: Ratio) -> Ratio:
        return Ratio(self.total + other.total, self.weight + other.weight)

    def value(self) -> Array:
        """Computes total / weight, and 0 where nothing was counted."""
        return self.total / jnp.where(self.weight > 0, self.weight, 1.0)


class Model(struct.PyTreeNode):
    """Holds a module as its structure (static) and its parameters (a plain dict)."""

    params: Params
    graphdef: nnx.GraphDef = struct.field(pytree_node=False)

    @property
    def vocab_size(self) -> int | None:
        """Returns the number of ids of a language model's vocabulary; None for other modules."""
        if self.graphdef is None:
            return None
        return getattr(nnx.merge(self.graphdef, self.params), "vocab_size", None)

    def __call__(
        self, batch: Batch, seed: Array | None = None, replaced_L: Array | None = None
    ) -> ModelOutput:
        """Runs the model. `seed` (uint32 scalar) turns dropout on; None is deterministic.
        `replaced_L` (bool) tells which new blocks run in place of the originals (Theseus)."""
        return nnx.merge(self.graphdef, self.params)(batch, seed, replaced_L)
