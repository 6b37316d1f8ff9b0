"""Defines the encoder of BERT and its successors: blocks with norms after residual sums."""

import jax.numpy as jnp
from flax import nnx

from kd_jax.models.attention import Attention, Scope
from kd_jax.models.block_runs import Layers, run_blocks
from kd_jax.models.layers import (
    Bottleneck,
    Embedding,
    LayerNorm,
    Linear,
    Mlp,
    check_length,
    dropout,
)
from kd_jax.models.model_config import BlockShape, EncoderConfig
from kd_jax.types import Array, Batch, Heads


class Block(nnx.Module):
    """A block: self-attention and MLP, with a layer norm after each residual sum. Takes three
    dropout sites."""

    def __init__(self, config: EncoderConfig, shape: BlockShape):
        self.attention = Attention(
            shape.width,
            shape.num_heads,
            scale=shape.head_width**-0.5,
            rate=config.attention_dropout,
            out_rate=config.attention_out_dropout,
            policy=config.policy,
            head_width=shape.head_width,
        )
        self.attention_norm = LayerNorm(shape.width, config.norm_eps)
        self.mlp = Mlp(
            shape.width, shape.ffn_width, config.activation, config.mlp_dropout, config.policy
        )
        self.mlp_norm = LayerNorm(shape.width, config.norm_eps)

    def __call__(
        self, x_BTD: Array, scope: Scope, seed: Array | None, site: int
    ) -> tuple[Array, Heads]:
        y_BTD, heads = self.attention(x_BTD, scope, seed, site)
        x_BTD = self.attention_norm(x_BTD + y_BTD)
        return self.mlp_norm(x_BTD + self.mlp(x_BTD, seed, site + 2)), heads


def make_block(config: EncoderConfig, layer: int) -> nnx.Module:
    """Makes the block of layer number `layer`, from 0: a whole block, or a bottleneck."""
    shape = config.shape(layer)
    own = Block(config, shape)
    return Bottleneck(config, shape, own) if shape.kind == "bottleneck" else own


class Encoder(nnx.Module):
    """Embeddings and blocks: the backbone of a `heads.HeadedModel`."""

    def __init__(self, config: EncoderConfig):
        width, policy = config.embedding_width, config.policy
        self.tokens = Embedding(config.vocab_size, width, policy)
        self.positions = Embedding(config.max_positions, width, policy)
        if config.num_types:
            self.types = Embedding(config.num_types, width, policy)
        self.norm = LayerNorm(width, config.norm_eps)
        self.widen = None if width == config.width else Linear(width, config.width, policy)
        self.blocks = nnx.List([make_block(config, i) for i in config.block_layers])
        self.predecessors = None  # models/replacement.py
        self.config = config

    def embed(self, batch: Batch, seed: Array | None) -> Array:
        """Sums token, position and type embeddings and normalizes them, (B, T, D)."""
        tokens_BT = batch.tokens_BT
        x_BTD = self.tokens(tokens_BT) + self.positions(_positions(tokens_BT, self.config))
        if self.config.num_types:
            types_BT = batch.types_BT
            types_BT = jnp.zeros((1, 1), jnp.int32) if types_BT is None else types_BT
            x_BTD = x_BTD + self.types(types_BT)
        x_BTD = dropout(self.norm(x_BTD), self.config.embedding_dropout, seed, 0)
        return x_BTD if self.widen is None else self.widen(x_BTD)

    def scope(self, batch: Batch) -> Scope:
        """Tells the blocks what a token sees: all tokens."""
        return Scope(batch.mask_BT > 0)

    def __call__(self, batch: Batch, seed: Array | None, replaced_L: Array | None = None) -> Layers:
        """Computes the embedding output and each block's output, (B, T, D), and its heads."""
        x_BTD, scope = self.embed(batch, seed), self.scope(batch)
        either = self.predecessors, replaced_L
        return run_blocks(self.blocks, x_BTD, scope, seed, 3, self.config, *either)

    states = __call__  # of blocks alone: no norm comes after the last one


def _positions(tokens_BT: Array, config: EncoderConfig) -> Array:
    """Computes positions, (1, T), or (B, T) if padding is skipped, which then has `pad_id`."""
    length = tokens_BT.shape[1]
    check_length(length, config.max_tokens)
    if not config.skip_padding:
        return jnp.arange(length)[None]
    real_BT = (tokens_BT != config.pad_id).astype(jnp.int32)
    return jnp.cumsum(real_BT, axis=1) * real_BT + config.pad_id
