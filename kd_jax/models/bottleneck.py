"""Defines the encoder of MobileBERT, whose blocks are narrower than the residual stream.

A block projects its input down, attends, applies several small MLPs, and projects up again; the
residual stream keeps its width. Token embeddings are narrow too: three neighboring ones are
concatenated and projected to the model's width.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from flax import nnx

from kd_jax.models.attention import Attention, Scope
from kd_jax.models.block_runs import Layers, run_blocks
from kd_jax.models.encoder import EncoderConfig
from kd_jax.models.layers import (
    Embedding,
    LayerNorm,
    Linear,
    Mlp,
    check_length,
    dropout,
)
from kd_jax.types import Array, Batch, Heads

DEFAULT_EPS = 1e-5  # torch's, which HF leaves in two of the norms


@dataclasses.dataclass(frozen=True, kw_only=True)
class BottleneckConfig(EncoderConfig):
    """The sizes and settings of a MobileBERT, in addition to those of a BERT."""

    unequal: ClassVar[str] = ""  # all blocks are alike
    token_width: int  # of the token embeddings
    trigrams: bool  # a token is embedded together with its neighbours
    bottlenecks: bool
    bottleneck_width: int
    bottleneck_values: bool  # values come from the bottleneck, and so do queries and keys
    shared_query_key: bool  # queries and keys have a bottleneck of their own
    num_mlps: int
    normalization: str  # layer_norm | no_norm

    @property
    def inner_width(self) -> int:
        """Returns the width of a block's attention and feed-forward layers."""
        return self.bottleneck_width if self.bottlenecks else self.width


class NoNorm(nnx.Module):
    """An affine map of every feature, used instead of a layer norm."""

    def __init__(self, width: int):
        self.scale = nnx.Param(jnp.ones((width,)))
        self.bias = nnx.Param(jnp.zeros((width,)))

    def __call__(self, x_BTD: Array) -> Array:
        y = x_BTD.astype(jnp.float32) * self.scale[...][None, None] + self.bias[...][None, None]
        return y.astype(x_BTD.dtype)


def make_norm(config: BottleneckConfig, width: int, eps: float) -> nnx.Module:
    """Makes the norm that the config names."""
    return NoNorm(width) if config.normalization == "no_norm" else LayerNorm(width, eps)


class Projection(nnx.Module):
    """A linear layer into a bottleneck, followed by a norm."""

    def __init__(self, config: BottleneckConfig):
        self.linear = Linear(config.width, config.inner_width, config.policy)
        self.norm = make_norm(config, config.inner_width, config.norm_eps)

    def __call__(self, x_BTD: Array) -> Array:
        return self.norm(self.linear(x_BTD))


class SmallMlp(nnx.Module):
    """An MLP with its residual sum and norm, without dropout."""

    def __init__(self, config: BottleneckConfig):
        widths = config.inner_width, config.ffn_width
        self.mlp = Mlp(*widths, config.activation, 0.0, config.policy)
        self.norm = make_norm(config, config.inner_width, config.norm_eps)

    def __call__(self, x_BTI: Array) -> Array:
        return self.norm(x_BTI + self.mlp(x_BTI, None, 0))


class Block(nnx.Module):
    """A block: projection down, self-attention, MLPs, projection up. Takes four dropout sites.

    I is the inner width. Without a bottleneck it is D, and dropout is where BERT has it; with one,
    dropout is only after the projection up.
    """

    def __init__(self, config: BottleneckConfig):
        width = config.inner_width
        dropout_inside = 0.0 if config.bottlenecks else config.mlp_dropout
        if config.bottlenecks:
            self.down = Projection(config)
            # Beside bottleneck_values nothing reads it, but checkpoints have it.
            self.query_key = Projection(config) if config.shared_query_key else None
            self.up = Linear(width, config.width, config.policy)
            self.up_norm = make_norm(config, config.width, config.norm_eps)
        self.attention = Attention(
            width,
            config.num_heads,
            scale=(width // config.num_heads) ** -0.5,
            rate=config.attention_dropout,
            out_rate=dropout_inside,
            policy=config.policy,
            value_width=width if config.bottleneck_values else config.width,
        )
        self.attention_norm = make_norm(config, width, config.norm_eps)
        self.small_mlps = nnx.List([SmallMlp(config) for _ in range(config.num_mlps - 1)])
        self.mlp = Mlp(width, config.ffn_width, config.activation, dropout_inside, config.policy)
        self.mlp_norm = make_norm(config, width, DEFAULT_EPS)
        self.config = config

    def inputs(self, x_BTD: Array) -> tuple[Array, Array, Array]:
        """Computes the inputs of queries and keys, of values, and of the residual sum."""
        if not self.config.bottlenecks:
            return x_BTD, x_BTD, x_BTD
        inside_BTI = self.down(x_BTD)
        if self.config.bottleneck_values:
            return inside_BTI, inside_BTI, inside_BTI
        return (x_BTD if self.query_key is None else self.query_key(x_BTD)), x_BTD, inside_BTI

    def __call__(
        self, x_BTD: Array, scope: Scope, seed: Array | None, site: int
    ) -> tuple[Array, Heads]:
        queries, values, y_BTI = self.inputs(x_BTD)
        attended_BTI, heads = self.attention(queries, scope, seed, site, values)
        y_BTI = self.attention_norm(y_BTI + attended_BTI)
        for small_mlp in self.small_mlps:
            y_BTI = small_mlp(y_BTI)
        y_BTI = self.mlp_norm(y_BTI + self.mlp(y_BTI, seed, site + 2))
        if not self.config.bottlenecks:
            return y_BTI, heads
        y_BTD = dropout(self.up(y_BTI), self.config.mlp_dropout, seed, site + 3)
        return self.up_norm(x_BTD + y_BTD), heads


class BottleneckEncoder(nnx.Module):
    """Embeddings and blocks: a backbone for `heads.HeadedModel`."""

    def __init__(self, config: BottleneckConfig):
        policy, read = config.policy, config.token_width * (3 if config.trigrams else 1)
        self.tokens = Embedding(config.vocab_size, config.token_width, policy)
        self.widen = Linear(read, config.width, policy)  # checkpoints have it even where it is idle
        self.positions = Embedding(config.max_positions, config.width, policy)
        self.types = Embedding(config.num_types, config.width, policy)
        self.norm = make_norm(config, config.width, DEFAULT_EPS)
        self.blocks = nnx.List([Block(config) for _ in config.block_layers])
        self.predecessors = None  # models/replacement.py
        self.config = config

    def embed(self, batch: Batch, seed: Array | None) -> Array:
        """Sums token, position and type embeddings and normalizes them, (B, T, D).

        The embedding of a row's last token includes the padding token after it, if any, as in HF.
        """
        length = batch.tokens_BT.shape[1]
        check_length(length, self.config.max_tokens)
        x = self.tokens(batch.tokens_BT)
        if self.config.trigrams:
            padded = jnp.pad(x, ((0, 0), (1, 1), (0, 0)))
            x = jnp.concatenate([padded[:, 2:], x, padded[:, :-2]], axis=-1)
        if x.shape[-1] != self.config.width or self.config.trigrams:
            x = self.widen(x)
        types_BT = batch.types_BT
        types_BT = jnp.zeros((1, 1), jnp.int32) if types_BT is None else types_BT
        x_BTD = x + self.positions(jnp.arange(length)[None]) + self.types(types_BT)
        return dropout(self.norm(x_BTD), self.config.embedding_dropout, seed, 0)

    def __call__(self, batch: Batch, seed: Array | None, replaced_L: Array | None = None) -> Layers:
        """Computes the embedding output, each block's output, (B, T, D), and attention heads."""
        x_BTD, scope = self.embed(batch, seed), Scope(batch.mask_BT > 0)
        either = self.predecessors, replaced_L
        return run_blocks(self.blocks, x_BTD, scope, seed, 4, self.config, *either)
