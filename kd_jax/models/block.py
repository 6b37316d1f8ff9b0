"""Decoder blocks: the family's own, and one that works in a bottleneck."""

from flax import nnx

from kd_jax.models.decoder_config import DecoderConfig
from kd_jax.models.layers import Attention, LayerNorm, Linear, Mlp
from kd_jax.models.shapes import BlockShape
from kd_jax.types import Array, Heads


class Block(nnx.Module):
    """Causal self-attention and MLP, each on a normalised copy. Takes three dropout sites."""

    def __init__(self, config: DecoderConfig, layer: int, shape: BlockShape):
        scale = shape.head_width**-0.5 if config.scale_scores else 1.0
        self.attention_norm = LayerNorm(shape.width, config.norm_eps)
        self.attention = Attention(
            shape.width,
            shape.num_heads,
            scale=scale / (layer + 1) if config.scale_by_layer else scale,
            rate=config.attention_dropout,
            out_rate=config.attention_out_dropout,
            policy=config.policy,
            num_kv_heads=shape.num_kv_heads,
            head_width=shape.head_width,
        )
        self.mlp_norm = LayerNorm(shape.width, config.norm_eps)
        self.mlp = Mlp(
            shape.width, shape.ffn_width, config.activation, config.mlp_dropout, config.policy
        )

    def __call__(
        self, x_BTD: Array, mask: Array, seed: Array | None, site: int
    ) -> tuple[Array, Heads]:
        y_BTD, heads = self.attention(self.attention_norm(x_BTD), mask, seed, site)
        x_BTD = x_BTD + y_BTD
        return x_BTD + self.mlp(self.mlp_norm(x_BTD), seed, site + 2), heads


class BottleneckBlock(nnx.Module):
    """x + up(inner(down(x))), `inner` a `Block` of another width. Takes its dropout sites."""

    def __init__(self, config: DecoderConfig, layer: int, shape: BlockShape):
        self.down = Linear(config.width, shape.width, config.policy)
        self.inner = Block(config, layer, shape)
        self.up = Linear(shape.width, config.width, config.policy)

    def __call__(
        self, x_BTD: Array, mask: Array, seed: Array | None, site: int
    ) -> tuple[Array, Heads]:
        y, heads = self.inner(self.down(x_BTD), mask, seed, site)
        return x_BTD + self.up(y), heads


def make_block(config: DecoderConfig, layer: int) -> nnx.Module:
    """The block of one layer, counted from 0, as its shape says."""
    shape = config.shape(layer)
    return (BottleneckBlock if shape.kind == "bottleneck" else Block)(config, layer, shape)
