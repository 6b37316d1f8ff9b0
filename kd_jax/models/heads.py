"""Defines heads, which compute features and an unembedding, or a few logits, from hidden states.

No head computes logits over a vocabulary: these are `ModelOutput.features` times `unembed_VD` plus
`bias_V`, and losses compute them in chunks.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from kd_jax.models.layers import MASKED, Embedding, LayerNorm, Linear, activation, dropout, gather
from kd_jax.types import Array, Batch, ModelOutput

SITES = 1 << 16  # dropout sites of heads begin here; backbones count theirs from 0


class MaskedLM(nnx.Module):
    """Predicts masked tokens as BERT does: linear, activation, layer norm, unembedding with a bias.

    If embeddings are narrower than the model, so is what comes out of the layer (ELECTRA), or the
    table `rest` has the columns that the unembedding lacks (MobileBERT).
    """

    def __init__(self, config):
        width = config.embedding_width if config.narrow_head else config.width
        self.transform = Linear(config.width, width, config.policy, config.transform_bias)
        self.norm = LayerNorm(width, config.norm_eps, config.norm_bias)
        self.bias = nnx.Param(jnp.zeros((config.vocab_size,))) if config.head_bias else None
        self.unembed = _unembed(config)
        missing = width - config.embedding_width
        self.rest = Embedding(config.vocab_size, missing, config.policy) if missing else None
        self.activation = activation(config.head_activation)

    def __call__(self, x_BTD: Array, batch: Batch, seed: Array | None, embedding_VD: Array):
        """Computes (features_BPD, unembed_VD, bias_V or None), at the batch's positions if it has
        any."""
        x_BPD = gather(x_BTD, batch.positions_BP)
        features = self.norm(self.activation(self.transform(x_BPD)))
        unembed_VD = _untied(self.unembed, embedding_VD)
        if self.rest is not None:
            unembed_VD = jnp.concatenate([unembed_VD, self.rest.embedding[...]], axis=1)
        return features, unembed_VD, None if self.bias is None else self.bias[...]


class CausalLM(nnx.Module):
    """Predicts the next token: the unembedding alone, with a bias in Phi."""

    def __init__(self, config):
        self.unembed = _unembed(config)
        self.bias = nnx.Param(jnp.zeros((config.vocab_size,))) if config.head_bias else None

    def __call__(self, x_BTD: Array, batch: Batch, seed: Array | None, embedding_VD: Array):
        """Returns (x_BPD, unembed_VD, bias_V or None)."""
        return gather(x_BTD, batch.positions_BP), *self.unembedding(embedding_VD)

    def unembedding(self, embedding_VD: Array) -> tuple[Array, Array | None]:
        """Returns (unembed_VD, bias_V or None)."""
        bias_V = None if self.bias is None else self.bias[...]
        return _untied(self.unembed, embedding_VD), bias_V


class Headless(nnx.Module):
    """Returns the last hidden state as features."""

    def __init__(self, config):
        del config

    def __call__(self, x_BTD: Array, batch: Batch, seed: Array | None, embedding_VD: Array):
        """Returns (x_BPD, embedding_VD, None)."""
        return gather(x_BTD, batch.positions_BP), embedding_VD, None


class Begun(nnx.Module):
    """Base of heads on classes and spans, which may begin with a linear layer, an activation and a
    norm (ModernBERT)."""

    def __init__(self, config, begun: bool):
        width, normed = config.width, begun and config.pooler_norm
        bias = config.transform_bias
        self.pooler = Linear(width, width, config.policy, bias) if begun else None
        self.activation = activation(config.pooler) if begun else None
        self.norm = LayerNorm(width, config.norm_eps, config.norm_bias) if normed else None

    def begin(self, x_BTD: Array) -> Array:
        if self.pooler is not None:
            x_BTD = self.activation(self.pooler(x_BTD))
        return x_BTD if self.norm is None else self.norm(x_BTD)


class Classification(Begun):
    """Predicts one of the config's labels from a row's first token, or the mean of its tokens; one
    label is a regression.

    That goes through a pooler, a linear layer with an activation (BERT's tanh, DistilBERT's relu;
    MobileBERT may have none), then through the classifier.
    """

    def __init__(self, config):
        super().__init__(config, config.pooler is not None)
        self.classifier = Linear(config.width, len(config.labels), _float32_out(config.policy))
        self.rate = config.classifier_rate
        self.early_rate = self.rate if config.drop_before_pooler else 0.0
        self.pooling = config.classifier_pooling

    def __call__(self, x_BTD: Array, batch: Batch, seed: Array | None, embedding_VD: Array):
        """Computes (logits_B1C, None, None), float32."""
        x_B1D = x_BTD[:, :1]
        if self.pooling == "mean":
            x_B1D = _pool(x_BTD, _real(batch), "mean").astype(x_BTD.dtype)
        x_B1D = self.begin(dropout(x_B1D, self.early_rate, seed, SITES))
        return self.classifier(dropout(x_B1D, self.rate, seed, SITES + 1)), None, None


class Span(Begun):
    """Predicts an answer's first and last token: two logits a token."""

    def __init__(self, config):
        super().__init__(config, config.pooler_norm)
        self.span = Linear(config.width, 2, _float32_out(config.policy))
        self.rate = config.span_dropout

    def __call__(self, x_BTD: Array, batch: Batch, seed: Array | None, embedding_VD: Array):
        """Computes (logits_B2T, None, None), float32; padding has MASKED."""
        logits_BT2 = self.span(dropout(self.begin(x_BTD), self.rate, seed, SITES))
        real_B1T = batch.mask_BT[:, None] > 0
        return jnp.where(real_B1T, logits_BT2.swapaxes(1, 2), MASKED), None, None


class Embedder(nnx.Module):
    """Computes one vector for a row, as sentence-transformers does (Reimers and Gurevych 2019,
    "Sentence-BERT", arXiv:1908.10084).

    The last hidden states are pooled over the row's tokens (`mean`, `max`, the first one `cls`, the
    `last` one), go through dense layers, are divided by their L2 norm, and cut to their first
    dimensions, each where the config says so. A cut vector is not normalized again: the library
    does not either.
    """

    def __init__(self, config):
        widths = config.width, *(each.width for each in config.dense)
        policy = _float32_out(config.policy)
        self.dense = nnx.List(
            [
                Linear(into, each.width, policy, each.bias)
                for into, each in zip(widths, config.dense, strict=False)
            ]
        )
        self.activations = tuple(activation(each.activation) for each in config.dense)
        self.pooling, self.normalize = config.pooling, config.normalize
        self.dimensions = config.dimensions or widths[-1]

    def __call__(self, x_BTD: Array, batch: Batch, seed: Array | None, embedding_VD: Array):
        """Computes (vectors_B1D, None, None), float32."""
        x_B1D = _pool(x_BTD, _real(batch), self.pooling)
        for layer, apply in zip(self.dense, self.activations, strict=True):
            x_B1D = apply(layer(x_B1D))
        if self.normalize:
            squares_B11 = jnp.sum(x_B1D * x_B1D, axis=-1, keepdims=True)
            x_B1D = x_B1D * jax.lax.rsqrt(jnp.maximum(squares_B11, 1e-24))
        return x_B1D[..., : self.dimensions], None, None


def _real(batch: Batch) -> Array:
    """Tells what is a token, (B, T). Rows that fill a batch up have none: the first one counts."""
    return (batch.mask_BT > 0) | (jnp.arange(batch.mask_BT.shape[1])[None] == 0)


def _pool(x_BTD: Array, real_BT: Array, pooling: str) -> Array:
    """Pools the real tokens of each row, (B, 1, D) in float32."""
    real_BT1 = real_BT[..., None]
    if pooling in ("cls", "last"):
        at_B = jnp.sum(real_BT, axis=1) - 1 if pooling == "last" else jnp.zeros(len(x_BTD), int)
        return gather(x_BTD, at_B[:, None]).astype(jnp.float32)
    x_BTD = x_BTD.astype(jnp.float32)
    if pooling == "max":
        return jnp.max(x_BTD, axis=1, keepdims=True, where=real_BT1, initial=-jnp.inf)
    return jnp.mean(x_BTD, axis=1, keepdims=True, where=real_BT1)


HEADS: dict[str, type[nnx.Module]] = {
    "mlm": MaskedLM,
    "clm": CausalLM,
    "classification": Classification,
    "span": Span,
    "embedding": Embedder,
    "none": Headless,
}


class HeadedModel(nnx.Module):
    """A model: a backbone and a head."""

    def __init__(self, backbone: nnx.Module, config, head: str):
        self.backbone = backbone
        self.head = HEADS[head](config)
        self.vocab_size = config.vocab_size

    def __call__(
        self, batch: Batch, seed: Array | None = None, replaced_L: Array | None = None
    ) -> ModelOutput:
        """Runs backbone and head. `seed` (uint32 scalar) turns dropout on; `replaced_L` as in
        `run_blocks`."""
        hidden, attention = self.backbone(batch, seed, replaced_L)
        embedding_VD = self.backbone.tokens.embedding[...]
        features, unembed_VD, bias_V = self.head(hidden[-1], batch, seed, embedding_VD)
        return ModelOutput(features, unembed_VD, bias_V, hidden, attention, self.vocab_size)


def _unembed(config):
    """Makes an unembedding; None if it is tied to the token embedding."""
    if config.tie_embeddings:
        return None
    return nnx.Param(jnp.zeros((config.vocab_size, config.embedding_width)))


def _untied(unembed, embedding_VD: Array) -> Array:
    return embedding_VD if unembed is None else unembed[...]


def _float32_out(policy):
    """Returns the policy for products that make logits, which stay in float32."""
    return dataclasses.replace(policy, activation="float32")
