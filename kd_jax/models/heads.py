"""Heads: from the backbone's last hidden state to features and an unembedding.

No head makes logits: `ModelOutput.features` times `unembed_VD` plus `bias_V` are the logits, and
the losses take them in chunks.
"""

import jax.numpy as jnp
from flax import nnx

from kd_jax.models.layers import LayerNorm, Linear, activation, gather
from kd_jax.types import Array, Batch, ModelOutput


class MaskedLM(nnx.Module):
    """BERT's masked-LM head: linear, activation, layer norm, then the unembedding with a bias."""

    def __init__(self, config):
        self.transform = Linear(config.width, config.width, config.policy)
        self.norm = LayerNorm(config.width, config.norm_eps)
        self.bias = nnx.Param(jnp.zeros((config.vocab_size,)))
        self.unembed = _unembed(config)
        self.activation = activation(config.head_activation)

    def __call__(self, x_BPD: Array, embedding_VD: Array):
        """(features_BPD, unembed_VD, bias_V)."""
        features = self.norm(self.activation(self.transform(x_BPD)))
        return features, _untied(self.unembed, embedding_VD), self.bias[...]


class CausalLM(nnx.Module):
    """The unembedding alone: GPT-2's head."""

    def __init__(self, config):
        self.unembed = _unembed(config)

    def __call__(self, x_BPD: Array, embedding_VD: Array):
        """(features_BPD, unembed_VD, None)."""
        return x_BPD, _untied(self.unembed, embedding_VD), None


class Headless(nnx.Module):
    """No head: the features are the last hidden state."""

    def __init__(self, config):
        del config

    def __call__(self, x_BPD: Array, embedding_VD: Array):
        """(x_BPD, embedding_VD, None)."""
        return x_BPD, embedding_VD, None


HEADS: dict[str, type[nnx.Module]] = {"mlm": MaskedLM, "clm": CausalLM, "none": Headless}


class LanguageModel(nnx.Module):
    """A backbone and the head of that name."""

    def __init__(self, backbone: nnx.Module, config, head: str):
        self.backbone = backbone
        self.head = HEADS[head](config)

    def __call__(self, batch: Batch, seed: Array | None = None) -> ModelOutput:
        """Runs the head at the batch's positions only, where it has any."""
        hidden = self.backbone(batch, seed)
        features, unembed_VD, bias_V = self.head(
            gather(hidden[-1], batch.positions_BP), self.backbone.tokens.embedding[...]
        )
        return ModelOutput(features, unembed_VD, bias_V, hidden)


def _unembed(config):
    """A table of its own where the checkpoint does not tie it to the token embedding."""
    if config.tie_embeddings:
        return None
    return nnx.Param(jnp.zeros((config.vocab_size, config.width)))


def _untied(unembed, embedding_VD: Array) -> Array:
    return embedding_VD if unembed is None else unembed[...]
