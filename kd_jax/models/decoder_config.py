"""Sizes and settings of a decoder."""

import dataclasses

from kd_jax.models import shapes
from kd_jax.models.rotary import Rotary
from kd_jax.models.shapes import BlockShape
from kd_jax.precision import Policy


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes and settings of a decoder. `hf_json`: the config.json it was read from, all keys."""

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int  # heads of keys and values; fewer than num_heads where several share them
    head_width: int | None  # None: width / num_heads
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
    scale_scores: bool = True  # divide scores by the root of the head's width
    scale_by_layer: bool = False  # divide scores of block i (from 0) by i + 1
    rotary: Rotary | None = None  # None: positions are a table
    rms_norm: bool = False  # instead of layer norm
    parallel: bool = False  # attention and MLP read the same normalised input
    gated: bool = False  # the MLP
    qkv_bias: bool = True
    attention_out_bias: bool = True
    mlp_bias: bool = True
    head_bias: bool = False  # of an untied or tied unembedding
    pad_id: int | None = None  # the token whose embedding starts at zero
    blocks: tuple[BlockShape, ...] = ()  # one a layer where they differ; none: all are `own_shape`
    hf_json: str = dataclasses.field(default="{}", compare=False, repr=False)
    policy: Policy = Policy()
    remat: bool = False  # compute each block again in the backward pass

    def __post_init__(self):
        shapes.check(self.blocks, self.num_layers, self.width)
        self._check_heads(self.blocks)

    def check_own(self) -> None:
        """Raises UserError where the family's own numbers do not go together."""
        self._check_heads((self.own_shape,))

    def _check_heads(self, blocks: tuple[BlockShape, ...]) -> None:
        if self.rotary is not None:
            for block in blocks:
                self.rotary.check(block.head_width)

    @property
    def own_shape(self) -> BlockShape:
        """The shape of every block of the family's own."""
        head_width = self.head_width or self.width // self.num_heads
        heads = self.num_heads, self.num_kv_heads, head_width
        return BlockShape("full", self.width, *heads, self.ffn_width)

    def shape(self, layer: int) -> BlockShape:
        """The shape of one layer's block, counted from 0."""
        return self.blocks[layer] if self.blocks else self.own_shape

    @property
    def embedding_width(self) -> int:
        """Width of the token embeddings."""
        return self.width

    @property
    def max_tokens(self) -> int:
        """The longest row that has positions."""
        return self.max_positions if self.rotary is None else self.rotary.max_tokens

    @property
    def head_widths(self) -> set[int]:
        """The widths of heads that occur in any layer."""
        return {self.shape(layer).head_width for layer in range(self.num_layers)}
