"""Decoder blocks: the family's own, and one that works in a bottleneck."""

from flax import nnx

from kd_jax.models.attention import Attention, Scope
from kd_jax.models.decoder_config import DecoderConfig
from kd_jax.models.layers import LayerNorm, Linear, Mlp, RmsNorm
from kd_jax.models.shapes import BlockShape
from kd_jax.types import Array, Heads


def make_norm(config: DecoderConfig, width: int) -> nnx.Module:
    """The norm that the config names."""
    return (RmsNorm if config.rms_norm else LayerNorm)(width, config.norm_eps)


class Block(nnx.Module):
    """Causal self-attention and MLP, each on a normalised copy; in parallel both read the same one.
    Takes three dropout sites."""

    def __init__(self, config: DecoderConfig, layer: int, shape: BlockShape):
        scale = shape.head_width**-0.5 if config.scale_scores else 1.0
        self.attention_norm = make_norm(config, shape.width)
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
        )
        self.mlp_norm = None if config.parallel else make_norm(config, shape.width)
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
        normed_BTD = self.attention_norm(x_BTD)
        y_BTD, heads = self.attention(normed_BTD, scope, seed, site)
        x_BTD = x_BTD + y_BTD
        if self.mlp_norm is not None:
            normed_BTD = self.mlp_norm(x_BTD)
        return x_BTD + self.mlp(normed_BTD, seed, site + 2), heads


class BottleneckBlock(nnx.Module):
    """x + up(inner(down(x))), `inner` a `Block` of another width. Takes its dropout sites."""

    def __init__(self, config: DecoderConfig, layer: int, shape: BlockShape):
        self.down = Linear(config.width, shape.width, config.policy)
        self.inner = Block(config, layer, shape)
        self.up = Linear(shape.width, config.width, config.policy)

    def __call__(
        self, x_BTD: Array, scope: Scope, seed: Array | None, site: int
    ) -> tuple[Array, Heads]:
        y, heads = self.inner(self.down(x_BTD), scope, seed, site)
        return x_BTD + self.up(y), heads


def make_block(config: DecoderConfig, layer: int) -> nnx.Module:
    """The block of one layer, counted from 0, as its shape says."""
    shape = config.shape(layer)
    return (BottleneckBlock if shape.kind == "bottleneck" else Block)(config, layer, shape)
