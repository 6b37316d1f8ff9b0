"""Sizes and settings of encoders and decoders, and of their blocks, which may differ.

Blocks differ after compression (Musaeus and van der Goot 2025, "Iterative Structured Knowledge
Distillation", COLING 2025 main 440; structured pruning). Two kinds of block are enough:

    full        as the family has it. With fewer heads or FFN columns than the family's own it is
                called slim: the residual stream keeps its width D, attention maps D to H K and back
    bottleneck  y = x + up(inner(down(x))): `down` projects D to d', `inner` is the whole output of
                a block of the family's own kind at width d' (its norms and residual sums included),
                `up` projects back; nothing normalizes the sum, so that a small `up` leaves x as
                it is, in an encoder too
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

from kd_jax.errors import UserError
from kd_jax.models.rotary import Rotary
from kd_jax.precision import Policy
from kd_jax.types import Array

KINDS = ("full", "bottleneck")


@dataclasses.dataclass(frozen=True)
class BlockShape:
    """The sizes of one block. Raises UserError if they do not fit together."""

    kind: str  # full | bottleneck
    width: int  # of the residual stream inside the block: the model's, or d' of a bottleneck
    num_heads: int
    num_kv_heads: int
    head_width: int
    ffn_width: int

    def __post_init__(self):
        if self.kind not in KINDS:
            raise UserError(f"a block's kind is {self.kind!r}; have: {', '.join(KINDS)}")
        for name, value in dataclasses.asdict(self).items():
            if name != "kind" and (type(value) is not int or value < 1):
                raise UserError(f"a block's {name} is {value!r}, want a whole number from 1")
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"a block's {self.num_kv_heads} key/value heads do not divide its "
                f"{self.num_heads} heads"
            )


def bottleneck(width: int, num_heads: int, num_kv_heads: int, ffn_width: int) -> BlockShape:
    """Makes a bottleneck of an inner width, which its heads divide among them.

    Raises UserError if the heads do not divide the width, or key/value heads the heads.
    """
    if num_heads < 1 or width % num_heads:
        raise UserError(f"{num_heads} heads do not divide the width {width} of a bottleneck")
    head_width = width // num_heads
    return BlockShape("bottleneck", width, num_heads, num_kv_heads, head_width, ffn_width)


def read_blocks(found: Any) -> tuple[BlockShape, ...]:
    """Reads the key "blocks" of a config.json. Raises UserError naming the entry."""
    names = [field.name for field in dataclasses.fields(BlockShape)]
    if not isinstance(found, list) or not found:
        raise UserError(
            f"config.json: blocks should be a list with one entry a layer, not {found!r}"
        )
    blocks = []
    for i, entry in enumerate(found):
        if not isinstance(entry, dict) or entry.keys() != set(names):
            raise UserError(
                f"config.json: blocks[{i}] should have the keys {', '.join(names)}, not {entry!r}"
            )
        try:
            blocks.append(BlockShape(**entry))
        except UserError as error:
            raise UserError(f"config.json: blocks[{i}]: {error}") from None
    return tuple(blocks)


def write_blocks(blocks: tuple[BlockShape, ...]) -> list[dict]:
    """Makes the key "blocks" of a config.json."""
    return [dataclasses.asdict(block) for block in blocks]


class Run(NamedTuple):
    """A pattern of `period` different blocks that repeats itself `count` times."""

    first: int  # layer
    period: int
    count: int

    def layers(self, number: int) -> range:
        """Lists the layers of the pattern's block of this number."""
        first = self.first + number
        return range(first, first + self.period * self.count, self.period)


class Texts(NamedTuple):
    """How an embedder's texts are read, and its vectors compared."""

    prompts: tuple[tuple[str, str], ...] = ()  # name -> what a text begins with
    default_prompt: str | None = None  # name of the one that texts have where nobody says otherwise
    similarity: str = "cosine"
    max_tokens: int | None = None  # of a text, which is cut; None: as many as the model takes


class Dense(NamedTuple):
    """A linear layer of an embedding head, with an activation."""

    width: int  # of what it gives
    activation: str = "linear"
    bias: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The sizes and settings that encoders and decoders have in common."""

    unequal: ClassVar[str] = ""  # model_type of those whose blocks differ; none: they may not
    inner: ClassVar[str] = ""  # what HF's names have for the block inside a bottleneck
    post_norm: ClassVar[bool] = False  # a block ends in a norm
    biased: ClassVar[bool] = False  # something is added to attention scores
    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    ffn_width: int
    max_positions: int  # rows of the position table, where there is one
    activation: str
    norm_eps: float
    embedding_dropout: float = 0.0
    attention_dropout: float  # of the attention weights
    attention_out_dropout: float = 0.0
    mlp_dropout: float = 0.0
    initializer_range: float
    tie_embeddings: bool
    pad_id: int | None = None  # the token whose embedding starts at zero
    rotary: Rotary | None = None  # None: positions are a table
    local_rotary: Rotary | None = None  # of layers with a window; None: as in the others
    unrotated: tuple[bool, ...] = ()  # which layers rotate no heads; none: all do
    window: int | None = None  # tokens that a token sees in a layer with a window
    windowed: tuple[bool, ...] = ()  # which layers have a window; none: no layer has
    pooling: str = "mean"  # of the embedding head: mean | cls | last | max
    dense: tuple[Dense, ...] = ()  # its layers behind the pooling
    normalize: bool = True  # its vectors to length 1
    dimensions: int = 0  # that its vectors keep, the first ones; 0: all
    texts: Texts = Texts()
    blocks: tuple[BlockShape, ...] = ()  # one a layer where they differ; none: all are `own_shape`
    hf_json: str = dataclasses.field(default="{}", compare=False, repr=False)  # all keys read from
    policy: Policy = Policy()
    remat: bool = False  # compute each block again in the backward pass
    remat_keeps: str = ""  # what is not computed again: products | nothing
    scan: bool = False  # run equal blocks that follow each other as one loop
    stacked: tuple[Run, ...] = ()  # which layers each entry of the parameters' blocks holds

    def __post_init__(self):
        if self.blocks and len(self.blocks) != self.num_layers:
            raise UserError(
                f"blocks: {len(self.blocks)} shapes for {self.num_layers} layers, want one a layer"
            )
        for layer, block in enumerate(self.blocks):
            if block.kind == "full" and block.width != self.width:
                raise UserError(
                    f"blocks: block {layer} is full and {block.width} wide, the model is "
                    f"{self.width}; make it a bottleneck, or as wide as the model"
                )
            self.check_block(layer, block)

    def check_own(self) -> None:
        """Raises UserError if the sizes of a normal block do not fit together."""
        if self.width % self.num_heads:
            raise UserError(
                f"config.json: {self.num_heads} attention heads do not divide the width "
                f"{self.width}"
            )
        self.check_block(0, self.own_shape)

    def check_block(self, layer: int, block: BlockShape) -> None:
        """Raises UserError if a layer's block has a shape that the model cannot have."""
        for each in self.rotaries:
            each.check(block.head_width)

    @property
    def own_shape(self) -> BlockShape:
        """Returns the shape of a normal block of the family."""
        heads = self.num_heads, self.num_heads, self.width // self.num_heads
        return BlockShape("full", self.width, *heads, self.ffn_width)

    def shape(self, layer: int) -> BlockShape:
        """Returns the shape of a layer's block, layers counted from 0."""
        return self.blocks[layer] if self.blocks else self.own_shape

    def with_layers(self, layers: Sequence[int]) -> "ModelConfig":
        """Makes the config of a model that has these layers of this one, of the normal shape."""
        own = {name: getattr(self, name) for name in ("windowed", "unrotated")}
        own = {name: tuple(each[i] for i in layers) for name, each in own.items() if each}
        return dataclasses.replace(self, num_layers=len(layers), **own)

    @property
    def block_layers(self) -> tuple[int, ...]:
        """Lists the first layer of each entry of the parameters' blocks: every one, or those of
        stacked runs."""
        if not self.stacked:
            return tuple(range(self.num_layers))
        return tuple(run.layers(i)[0] for run in self.stacked for i in range(run.period))

    @property
    def embedding_width(self) -> int:
        """Returns the width of the token embeddings."""
        return self.width

    @property
    def rotaries(self) -> tuple[Rotary, ...]:
        """Lists the model's rotary embeddings."""
        return tuple(each for each in (self.rotary, self.local_rotary) if each is not None)

    def rotary_of(self, layer: int) -> int | None:
        """Finds the number of a layer's rotary embedding; None if it has none."""
        if self.rotary is None or (self.unrotated and self.unrotated[layer]):
            return None
        return int(self.local_rotary is not None and self.window_of(layer) is not None)

    def window_of(self, layer: int) -> int | None:
        """Returns how many tokens a token sees in a layer, its own included; None: all."""
        return self.window if self.windowed and self.windowed[layer] else None

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Lists `window_of` of each layer."""
        return tuple(self.window_of(layer) for layer in range(self.num_layers))

    @property
    def head_widths(self) -> set[int]:
        """Returns the widths of heads in all layers."""
        return {self.shape(layer).head_width for layer in range(self.num_layers)}

    def angles(
        self, places_BT: Array, lengths_B: Array
    ) -> dict[tuple[int, int], tuple[Array, Array]]:
        """Computes the angles of an `attention.Scope`, of tokens at these positions in rows of
        these lengths."""
        return {
            (number, K): rotary.angles(K, places_BT, lengths_B[:, None])
            for number, rotary in enumerate(self.rotaries)
            for K in sorted(self.head_widths)
        }

    @property
    def max_tokens(self) -> int:
        """Returns the length of the longest row that has positions."""
        return self.max_positions if self.rotary is None else self.rotary.max_tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig(ModelConfig):
    """The sizes and settings of an encoder."""

    unequal: ClassVar[str] = "kd_jax_encoder"
    post_norm: ClassVar[bool] = True
    num_types: int = 0  # token types; 0 means that the family has none
    token_width: int | None = None  # of the embeddings; None: the model's
    norm_bias: bool = True  # of layer norms
    narrow_head: bool = False  # ELECTRA: the masked-LM head has the embeddings' width
    head_activation: str
    transform_bias: bool = True  # of a head's first layer
    head_bias: bool = True  # of the unembedding
    labels: tuple[str, ...]  # class names in their order; one alone is a regression
    classifier_dropout: float | None  # before the classifier; None: as mlp_dropout
    classifier_pooling: str = "cls"  # what the classifier reads: cls | mean
    pooler: str | None = "tanh"  # activation of the classifier's first layer; None: no such layer
    pooler_norm: bool = False  # ModernBERT: a norm after it, and both in front of the span head
    drop_before_pooler: bool = False  # RoBERTa
    span_dropout: float = 0.0  # DistilBERT: before the span head
    skip_padding: bool = False  # RoBERTa: positions count only non-padding tokens, from pad_id + 1
    sinusoidal: bool = False  # DistilBERT: how random positions start

    def check_block(self, layer: int, block: BlockShape) -> None:
        """Raises UserError if heads of a layer's block share keys, or cannot be rotated."""
        super().check_block(layer, block)
        if block.num_kv_heads != block.num_heads:
            raise UserError(
                f"blocks: block {layer} has {block.num_heads} heads and {block.num_kv_heads} "
                f"key/value heads; heads of an encoder share none, make them as many"
            )

    @property
    def embedding_width(self) -> int:
        """Returns the width of the token embeddings."""
        return self.token_width or self.width

    @property
    def classifier_rate(self) -> float:
        """Returns the dropout rate before the classifier."""
        return self.mlp_dropout if self.classifier_dropout is None else self.classifier_dropout

    @property
    def max_tokens(self) -> int:
        """Returns the length of the longest row that has positions."""
        return super().max_tokens - (self.pad_id + 1 if self.skip_padding else 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig(ModelConfig):
    """The sizes and settings of a decoder."""

    unequal: ClassVar[str] = "kd_jax_decoder"
    inner: ClassVar[str] = ".inner"
    num_kv_heads: int  # heads of keys and values; fewer than num_heads where several share them
    head_width: int | None = None  # None: width / num_heads
    scale_scores: bool = True  # divide scores by the root of the head's width
    score_width: int | None = None  # instead of the head's width
    scale_by_layer: bool = False  # divide scores of block i (from 0) by i + 1
    rms_norm: bool = False  # instead of layer norm
    offset_norms: bool = False  # an RMS norm's scale is 1 + its parameter
    norms: str = "before"  # where sublayers have a norm: before | after | both
    qk_norm: str = ""  # RMS norms of queries and keys: heads, each | all at once; none
    scale_embeddings: bool = False  # multiply token embeddings by the root of the width
    parallel: bool = False  # attention and MLP read the same normalized input
    gated: bool = False  # the MLP
    qkv_bias: bool = True
    attention_out_bias: bool = True
    mlp_bias: bool = True
    head_bias: bool = False  # of an untied or tied unembedding

    @property
    def own_shape(self) -> BlockShape:
        """Returns the shape of a normal block of the family."""
        head_width = self.head_width or self.width // self.num_heads
        heads = self.num_heads, self.num_kv_heads, head_width
        return BlockShape("full", self.width, *heads, self.ffn_width)

    def most_written(self, prompt: int) -> int:
        """Returns the tokens that a row may have when the model has written after a prompt of so
        many tokens: as many as it has positions, or fewer where LongRoPE would change the keys that
        are cached."""
        turning_point = self.rotary.turning_point if self.rotary else None
        within = turning_point is not None and prompt <= turning_point
        return min(self.max_tokens, turning_point) if within else self.max_tokens
