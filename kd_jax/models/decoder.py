"""The decoder of GPT-2: causal blocks that normalise before each sub-layer."""

from flax import nnx

from kd_jax.models import segments
from kd_jax.models.block import make_block
from kd_jax.models.decoder_config import DecoderConfig
from kd_jax.models.dropout import dropout
from kd_jax.models.layers import (
    Embedding,
    LayerNorm,
    Layers,
    run_blocks,
)
from kd_jax.types import Array, Batch


class Decoder(nnx.Module):
    """Embeddings, blocks and a last layer norm: a backbone for `heads.HeadedModel`."""

    def __init__(self, config: DecoderConfig):
        self.tokens = Embedding(config.vocab_size, config.width, config.policy)
        self.positions = Embedding(config.max_positions, config.width, config.policy)
        self.blocks = nnx.List([make_block(config, i) for i in range(config.num_layers)])
        self.norm = LayerNorm(config.width, config.norm_eps)
        self.config = config

    def embed(self, batch: Batch, seed: Array | None) -> Array:
        """Sum of token and position embeddings, (B, T, D)."""
        places = segments.positions(batch, self.config.max_tokens)
        x_BTD = self.tokens(batch.tokens_BT) + self.positions(places)
        return dropout(x_BTD, self.config.embedding_dropout, seed, 0)

    def states(self, batch: Batch, seed: Array | None) -> Layers:
        """The embedding output and each block's output, (B, T, D); each block's attention heads."""
        x_BTD, mask = self.embed(batch, seed), segments.mask(batch)
        return run_blocks(self.blocks, x_BTD, mask, seed, sites=3, remat=self.config.remat)

    def __call__(self, batch: Batch, seed: Array | None) -> Layers:
        """What `states` gives, the last block's output normalised."""
        hidden, attention = self.states(batch, seed)
        return (*hidden[:-1], self.norm(hidden[-1])), attention
