"""Defines the decoder of GPT-2, Llama and their successors: causal blocks of two sublayers."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from kd_jax.models.attention import Attention, Scope
from kd_jax.models.block_runs import Layers, each_block, run_blocks
from kd_jax.models.cache import Cache, filled
from kd_jax.models.layers import (
    Bottleneck,
    Embedding,
    LayerNorm,
    Mlp,
    RmsNorm,
    check_length,
    dropout,
)
from kd_jax.models.model_config import BlockShape, DecoderConfig
from kd_jax.types import Array, Batch, Heads


def make_norm(config: DecoderConfig, width: int) -> nnx.Module:
    """Makes the norm that the config names."""
    if config.rms_norm:
        return RmsNorm(width, config.norm_eps, config.offset_norms)
    return LayerNorm(width, config.norm_eps)


def _through(norm: nnx.Module | None, x_BTD: Array) -> Array:
    return x_BTD if norm is None else norm(x_BTD)


class Block(nnx.Module):
    """A block: causal self-attention and MLP, each on a normalized copy of its input, or with a
    norm after it, or both; if parallel, both on the same copy. Takes three dropout sites."""

    def __init__(self, config: DecoderConfig, layer: int, shape: BlockShape):
        scale = (config.score_width or shape.head_width) ** -0.5 if config.scale_scores else 1.0
        before, after = config.norms != "after", config.norms != "before"
        sizes = [count * shape.head_width for count in (shape.num_heads, shape.num_kv_heads)]
        sizes = {"each": [shape.head_width] * 2, "all": sizes, "": []}[config.qk_norm]
        self.attention_norm = make_norm(config, shape.width) if before else None
        self.attention_out_norm = make_norm(config, shape.width) if after else None
        self.attention = Attention(
            shape.width,
            shape.num_heads,
            scale=scale / (layer + 1) if config.scale_by_layer else scale,
            rate=config.attention_dropout,
            out_rate=config.attention_out_dropout,
            policy=config.policy,
            num_kv_heads=shape.num_kv_heads,
            head_width=shape.head_width,
            bias=config.qkv_bias,
            out_bias=config.attention_out_bias,
            window=config.window_of(layer),
            norms=tuple(make_norm(config, size) for size in sizes) or (None, None),
            rotary=config.rotary_of(layer),
        )
        self.mlp_norm = make_norm(config, shape.width) if before and not config.parallel else None
        self.mlp_out_norm = make_norm(config, shape.width) if after else None
        self.parallel = config.parallel
        self.mlp = Mlp(
            shape.width,
            shape.ffn_width,
            config.activation,
            config.mlp_dropout,
            config.policy,
            gated=config.gated,
            bias=config.mlp_bias,
        )

    def __call__(
        self, x_BTD: Array, scope: Scope, seed: Array | None, site: int
    ) -> tuple[Array, Heads]:
        normed_BTD = _through(self.attention_norm, x_BTD)
        y_BTD, heads = self.attention(normed_BTD, scope, seed, site)
        x_BTD = x_BTD + _through(self.attention_out_norm, y_BTD)
        if not self.parallel:
            normed_BTD = _through(self.mlp_norm, x_BTD)
        y_BTD = self.mlp(normed_BTD, seed, site + 2)
        return x_BTD + _through(self.mlp_out_norm, y_BTD), heads


def make_block(config: DecoderConfig, layer: int) -> nnx.Module:
    """Makes the block of a layer, counted from 0, by the layer's shape."""
    shape = config.shape(layer)
    own = Block(config, layer, shape)
    return Bottleneck(config, shape, own) if shape.kind == "bottleneck" else own


class Decoder(nnx.Module):
    """A decoder: embeddings, blocks and a last norm; the backbone of a `heads.HeadedModel`."""

    def __init__(self, config: DecoderConfig):
        self.tokens = Embedding(config.vocab_size, config.width, config.policy)
        if config.rotary is None:
            self.positions = Embedding(config.max_positions, config.width, config.policy)
        self.blocks = nnx.List([make_block(config, i) for i in config.block_layers])
        self.predecessors = None  # models/replacement.py
        self.norm = make_norm(config, config.width)
        self.config = config

    def embed(self, tokens_BT: Array, places_BT: Array, seed: Array | None) -> Array:
        """Looks up embeddings of tokens, and of positions unless they are rotary, (B, T, D)."""
        x_BTD = self.tokens(tokens_BT)
        if self.config.scale_embeddings:
            x_BTD = x_BTD * jnp.asarray(math.sqrt(self.config.width), x_BTD.dtype)
        if self.config.rotary is None:
            x_BTD = x_BTD + self.positions(places_BT)
        return dropout(x_BTD, self.config.embedding_dropout, seed, 0)

    def states(self, batch: Batch, seed: Array | None, replaced_L: Array | None = None) -> Layers:
        """Computes the embedding output and each block's output, (B, T, D), and its heads."""
        places_BT = positions(batch, self.config.max_tokens)
        lengths_B = jnp.where(batch.mask_BT > 0, places_BT, 0).max(axis=1) + 1
        scope = Scope(
            batch.mask_BT > 0,
            batch.segments_BT,
            None if batch.segments_BT is None else places_BT,
            self.config.angles(places_BT, lengths_B),
            causal=True,
        )
        x_BTD = self.embed(batch.tokens_BT, places_BT, seed)
        either = self.predecessors, replaced_L
        return run_blocks(self.blocks, x_BTD, scope, seed, 3, self.config, *either)

    def __call__(self, batch: Batch, seed: Array | None, replaced_L: Array | None = None) -> Layers:
        """Computes `states`, and normalizes the last block's output."""
        hidden, attention = self.states(batch, seed, replaced_L)
        return (*hidden[:-1], self.norm(hidden[-1])), attention

    def start(self, tokens_BT: Array, lengths_B: Array, room: int) -> tuple[Array, Cache]:
        """Runs the blocks on the beginnings of rows, (B, T), of which padding follows `lengths_B`
        tokens. Returns the normalized last hidden state of each row's last token, (B, D), and a
        cache with room for so many more tokens."""
        real_BT = jnp.arange(tokens_BT.shape[1])[None] < lengths_B[:, None]
        mask_BT = real_BT.astype(jnp.float32)
        hidden, heads = self.states(Batch(None, tokens_BT, mask_BT, None, None), None)
        last_B11 = (lengths_B - 1)[:, None, None]
        x_B1D = self.norm(jnp.take_along_axis(hidden[-1], last_B11, axis=1))
        return x_B1D[:, 0], filled(heads, real_BT, room)

    def extend(self, cache: Cache, tokens_B: Array) -> tuple[Array, Cache]:
        """Runs the blocks on one more token of each row. Returns its normalized last hidden state,
        (B, D), and the cache with it."""
        places_B1, cache = cache.lengths_B[:, None], cache.next()
        angles = self.config.angles(places_B1, cache.lengths_B)
        x_B1D, kept = self.embed(tokens_B[:, None], places_B1, None), []
        for layer, block in enumerate(each_block(self.blocks, self.config)):
            scope = Scope(None, angles=angles, past=cache.of_layer(layer), causal=True)
            x_B1D, past = block(x_B1D, scope, None, 0)
            kept.append((past.k_BGKS, past.v_BGKS))
        return self.norm(x_B1D)[:, 0], cache.replace(past=tuple(kept))


# Rows may hold several continuations of one beginning (`Batch.segments_BT`): what comes out for a
# continuation is what it would be in a row alone, and the beginning is computed once.


def positions(batch: Batch, max_tokens: int) -> Array:
    """Computes each token's position, int32 (1, T), or (B, T) with segments, which each continue
    from the end of segment 0.

    Raises UserError for rows longer than `max_tokens`; with segments, the maker of the rows must
    ensure that no continuation is too long.
    """
    index_T = jnp.arange(batch.tokens_BT.shape[1])
    if batch.segments_BT is None:
        check_length(len(index_T), max_tokens)
        return index_T[None]
    segments_BT = batch.segments_BT
    shared_B1 = ((segments_BT == 0) & (batch.mask_BT > 0)).sum(axis=1, keepdims=True)
    before_BT = jnp.pad(segments_BT[:, :-1], ((0, 0), (1, 0)))
    starts_BT = jnp.where(segments_BT != before_BT, index_T[None], 0)
    begun_BT = jax.lax.cummax(starts_BT, axis=1)  # where the token's segment begins
    places_BT = jnp.where(segments_BT == 0, index_T[None], shared_B1 + index_T[None] - begun_BT)
    return jnp.minimum(places_BT, max_tokens - 1)  # padding
