"""Describes the family ModernBERT (Warner et al. 2024, arXiv:2412.13663), with Ettin's encoders
(Weller et al. 2025, arXiv:2507.11412): norms before the sublayers, rotary embeddings, gated MLPs,
and in two of three layers a window, on both sides of a token."""

import dataclasses
import math
import re

import jax.numpy as jnp
from flax import nnx
from jax.scipy.special import erf, erfinv

from kd_jax.models import windows
from kd_jax.models.attention import Attention, Scope
from kd_jax.models.block_runs import Layers, run_blocks
from kd_jax.models.config_json import SIZE, Fields
from kd_jax.models.family import Family, classes
from kd_jax.models.layers import Embedding, LayerNorm, Mlp, check_length, dropout
from kd_jax.models.model_config import EncoderConfig
from kd_jax.types import Array, Batch, Heads


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModernBertConfig(EncoderConfig):
    """The sizes and settings of a ModernBERT."""

    unequal = ""  # all blocks are alike
    post_norm = False
    attention_bias: bool
    mlp_bias: bool
    initializer_cutoff: float | None  # of random values, in standard deviations; None: 3


class Block(nnx.Module):
    """A block: self-attention and gated MLP, each on a normalized copy of its input, which the
    first block's attention takes as it is. Takes three dropout sites."""

    def __init__(self, config: ModernBertConfig, layer: int):
        self.attention_norm = _norm(config) if layer else None
        self.attention = Attention(
            config.width,
            config.num_heads,
            scale=config.shape(layer).head_width ** -0.5,
            rate=config.attention_dropout,
            out_rate=config.attention_out_dropout,
            policy=config.policy,
            bias=config.attention_bias,
            out_bias=config.attention_bias,
            window=config.window_of(layer),
            rotary=config.rotary_of(layer),
        )
        self.mlp_norm = _norm(config)
        self.mlp = Mlp(
            config.width,
            config.ffn_width,
            config.activation,
            config.mlp_dropout,
            config.policy,
            gated=True,
            bias=config.mlp_bias,
            drop_inside=True,
        )

    def __call__(
        self, x_BTD: Array, scope: Scope, seed: Array | None, site: int
    ) -> tuple[Array, Heads]:
        normed_BTD = x_BTD if self.attention_norm is None else self.attention_norm(x_BTD)
        y_BTD, heads = self.attention(normed_BTD, scope, seed, site)
        x_BTD = x_BTD + y_BTD
        return x_BTD + self.mlp(self.mlp_norm(x_BTD), seed, site + 2), heads


def _norm(config: ModernBertConfig) -> LayerNorm:
    return LayerNorm(config.width, config.norm_eps, config.norm_bias)


class PreNormEncoder(nnx.Module):
    """Embeddings, blocks and a last norm: the backbone of a `heads.HeadedModel`."""

    def __init__(self, config: ModernBertConfig):
        self.tokens = Embedding(config.vocab_size, config.width, config.policy)
        self.embedding_norm = _norm(config)
        self.blocks = nnx.List([Block(config, i) for i in config.block_layers])
        self.predecessors = None  # models/replacement.py
        self.norm = _norm(config)
        self.config = config

    def states(self, batch: Batch, seed: Array | None, replaced_L: Array | None = None) -> Layers:
        """Computes the embedding output and each block's output, (B, T, D), and its heads."""
        length, real_BT = batch.tokens_BT.shape[1], batch.mask_BT > 0
        check_length(length, self.config.max_tokens)
        places_BT = jnp.arange(length)[None]
        lengths_B = jnp.where(real_BT, places_BT, 0).max(axis=1) + 1
        scope = Scope(real_BT, angles=self.config.angles(places_BT, lengths_B))
        x_BTD = self.embedding_norm(self.tokens(batch.tokens_BT))
        x_BTD = dropout(x_BTD, self.config.embedding_dropout, seed, 0)
        either = self.predecessors, replaced_L
        return run_blocks(self.blocks, x_BTD, scope, seed, 3, self.config, *either)

    def __call__(self, batch: Batch, seed: Array | None, replaced_L: Array | None = None) -> Layers:
        """Computes `states`, and normalizes the last block's output."""
        hidden, attention = self.states(batch, seed, replaced_L)
        return (*hidden[:-1], self.norm(hidden[-1])), attention


THETAS = {  # by the kind of layer: the key of theta, and its default
    windows.FULL: ("global_rope_theta", 160_000.0),
    windows.SLIDING: ("local_rope_theta", 10_000.0),
}


def _read(fields: Fields, values: dict) -> dict:
    if (fields.get("pad_token_id", int | None, 50283) or 0) >= values["vocab_size"]:
        fields.json["pad_token_id"] = None  # HF's table would lack its row
    count = values["num_layers"]
    every = fields.get("global_attn_every_n_layers", SIZE, None) or 3
    # HF's window is as many tokens on both sides; a token sees itself as well.
    window = fields.get("local_attention", SIZE, 128) // 2 * 2 + 1
    return {
        **windows.read_rotaries(fields, values["max_positions"], THETAS),
        **windows.layers(fields, count, window, lambda layer: layer % every != 0),
    }


def _write(config: ModernBertConfig) -> dict:
    """Writes the keys that `_read` reads. Layers that follow no rule have a list alone, which
    transformers 4 does not know: a null there stops it."""
    slides = [window is not None for window in config.windows]
    every = (
        n
        for n in range(1, config.num_layers + 1)
        if slides == [layer % n != 0 for layer in range(config.num_layers)]
    )
    return {
        "global_attn_every_n_layers": next(every, None),
        "local_attention": config.window - 1,
        **windows.layer_types(config),
        **windows.write_rotaries(config, THETAS),
    }


def _start(path: str, value: Array, config: ModernBertConfig) -> Array:
    """Cuts the tails of normal values off, and makes those small that write into the residual
    stream, as HF does."""
    most, scale = math.erf((config.initializer_cutoff or 3.0) * 0.5**0.5), 2**0.5
    scale *= config.initializer_range or 1.0
    value = scale * erfinv(most * erf(value / scale))
    if re.search(r"head/(classifier|span)/", path):
        return value / scale * (2 / config.width) ** 0.5
    small = re.search(r"(attention/o|mlp/down|head/(transform|pooler))/|head/unembed", path)
    return value * (2 * config.num_layers) ** -0.5 if small else value


FAMILY = Family(
    name="modernbert",
    prefix="model.",
    architectures=classes("ModernBert", "mlm", "classification", "span"),
    backbone=PreNormEncoder,
    keys={
        "vocab_size": ("vocab_size", 50368),
        "hidden_size": ("width", 768),
        "num_hidden_layers": ("num_layers", 22),
        "num_attention_heads": ("num_heads", 12),
        "intermediate_size": ("ffn_width", 1152),
        "max_position_embeddings": ("max_positions", 8192),
        "hidden_activation": ("activation", "gelu"),
        "norm_eps": ("norm_eps", 1e-5),
        "norm_bias": ("norm_bias", False),
        "attention_bias": ("attention_bias", False),
        "mlp_bias": ("mlp_bias", False),
        "embedding_dropout": ("embedding_dropout", 0.0),
        "attention_dropout": ("attention_dropout attention_out_dropout", 0.0),
        "mlp_dropout": ("mlp_dropout", 0.0),
        "classifier_activation": ("head_activation pooler", "gelu"),
        "classifier_bias": ("transform_bias", False),
        "classifier_dropout": ("classifier_dropout span_dropout", 0.0),
        "classifier_pooling": ("classifier_pooling", "cls"),
        "decoder_bias": ("head_bias", True),
        "initializer_range": ("initializer_range", 0.02),
        "initializer_cutoff_factor": ("initializer_cutoff", 2.0),
        "tie_word_embeddings": ("tie_embeddings", True),
    },
    only={"classifier_pooling": ("cls", "mean")},
    fixed={"pooler_norm": True},
    base={
        "embeddings.tok_embeddings": "backbone/tokens",
        "embeddings.norm": "backbone/embedding_norm",
        "layers.#.attn_norm": "backbone/blocks/#/attention_norm",
        "layers.#.attn.Wqkv": "backbone/blocks/#/attention/q,k,v",
        "layers.#.attn.Wo": "backbone/blocks/#/attention/o",
        "layers.#.mlp_norm": "backbone/blocks/#/mlp_norm",
        "layers.#.mlp.Wi": "backbone/blocks/#/mlp/gate,up",
        "layers.#.mlp.Wo": "backbone/blocks/#/mlp/down",
        "final_norm": "backbone/norm",
    },
    head={  # two of ours in one name: of different heads
        "head.dense": "head/transform,pooler",
        "head.norm": "head/norm",
        "decoder.weight": "head/unembed",
        "decoder.bias": "head/bias",
        "classifier": "head/classifier,span",
    },
    common=r"^head\.",
    read=_read,
    write=_write,
    adjust=_start,
)
