"""The decoder of GPT-2: causal blocks that normalise before each sub-layer."""

import dataclasses

import jax.numpy as jnp
from flax import nnx

from kd_jax.models.dropout import dropout
from kd_jax.models.layers import (
    Attention,
    Embedding,
    LayerNorm,
    Layers,
    Mlp,
    causal_mask,
    check_length,
    run_blocks,
)
from kd_jax.precision import Policy
from kd_jax.types import Array, Batch, Heads


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """What fixes a decoder. `hf_json` is the config.json it came from, for what else it says."""

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    ffn_width: int
    max_positions: int
    activation: str
    norm_eps: float
    embedding_dropout: float
    attention_dropout: float  # of the attention weights
    attention_out_dropout: float
    mlp_dropout: float
    initializer_range: float
    tie_embeddings: bool
    scale_scores: bool  # divide scores by the root of the head's width
    scale_by_layer: bool  # divide scores of block i (from 0) by i + 1
    hf_json: str = dataclasses.field(default="{}", compare=False, repr=False)
    policy: Policy = Policy()
    remat: bool = False  # compute each block again in the backward pass

    @property
    def embedding_width(self) -> int:
        """Width of the token embeddings."""
        return self.width

    @property
    def max_tokens(self) -> int:
        """The longest row that has positions."""
        return self.max_positions


class Block(nnx.Module):
    """Causal self-attention and MLP, each on a normalised copy. Takes three dropout sites."""

    def __init__(self, config: DecoderConfig, layer: int):
        scale = (config.width // config.num_heads) ** -0.5 if config.scale_scores else 1.0
        self.attention_norm = LayerNorm(config.width, config.norm_eps)
        self.attention = Attention(
            config.width,
            config.num_heads,
            scale=scale / (layer + 1) if config.scale_by_layer else scale,
            rate=config.attention_dropout,
            out_rate=config.attention_out_dropout,
            policy=config.policy,
        )
        self.mlp_norm = LayerNorm(config.width, config.norm_eps)
        self.mlp = Mlp(
            config.width, config.ffn_width, config.activation, config.mlp_dropout, config.policy
        )

    def __call__(
        self, x_BTD: Array, mask: Array, seed: Array | None, site: int
    ) -> tuple[Array, Heads]:
        y_BTD, heads = self.attention(self.attention_norm(x_BTD), mask, seed, site)
        x_BTD = x_BTD + y_BTD
        return x_BTD + self.mlp(self.mlp_norm(x_BTD), seed, site + 2), heads


class Decoder(nnx.Module):
    """Embeddings, blocks and a last layer norm: a backbone for `heads.HeadedModel`."""

    def __init__(self, config: DecoderConfig):
        self.tokens = Embedding(config.vocab_size, config.width, config.policy)
        self.positions = Embedding(config.max_positions, config.width, config.policy)
        self.blocks = nnx.List([Block(config, i) for i in range(config.num_layers)])
        self.norm = LayerNorm(config.width, config.norm_eps)
        self.config = config

    def embed(self, batch: Batch, seed: Array | None) -> Array:
        """Sum of token and position embeddings, (B, T, D)."""
        length = batch.tokens_BT.shape[1]
        check_length(length, self.config.max_tokens)
        x_BTD = self.tokens(batch.tokens_BT) + self.positions(jnp.arange(length)[None])
        return dropout(x_BTD, self.config.embedding_dropout, seed, 0)

    def __call__(self, batch: Batch, seed: Array | None) -> Layers:
        """The embedding output and each block's output, (B, T, D), the last one normalised; each
        block's attention heads."""
        x_BTD, mask = self.embed(batch, seed), causal_mask(batch.mask_BT)
        remat = self.config.remat
        hidden, attention = run_blocks(self.blocks, x_BTD, mask, seed, sites=3, remat=remat)
        return (*hidden[:-1], self.norm(hidden[-1])), attention
