"""Defines the sizes of a model's blocks, which may differ from layer to layer.

Blocks differ after compression (Musaeus and van der Goot 2025, "Iterative Structured Knowledge
Distillation", COLING 2025 main 440; structured pruning). Two kinds of block are enough:

    full        a normal block of the family. With fewer heads or FFN columns it is called slim: the
                residual stream keeps its width D, attention maps D to H K and back
    bottleneck  y = x + up(inner(down(x))): `down` projects D to d', `inner` is the whole output of
                a full block at width d' (its norms and residual sums included), `up` projects
                back; the sum is not normalized, so that a small `up` leaves x almost unchanged, in
                an encoder too
"""

import dataclasses
from typing import Any

from kd_jax.errors import UserError

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


def check(blocks: tuple[BlockShape, ...], num_layers: int, width: int) -> None:
    """Raises UserError for blocks that a model with these layers and width cannot have."""
    if blocks and len(blocks) != num_layers:
        raise UserError(f"blocks: {len(blocks)} shapes for {num_layers} layers, want one a layer")
    for i, block in enumerate(blocks):
        if block.kind == "full" and block.width != width:
            raise UserError(
                f"blocks: block {i} is full and {block.width} wide, the model is {width}; "
                f"make it a bottleneck, or as wide as the model"
            )


def read(found: Any) -> tuple[BlockShape, ...]:
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


def write(blocks: tuple[BlockShape, ...]) -> list[dict]:
    """Makes the key "blocks" of a config.json."""
    return [dataclasses.asdict(block) for block in blocks]
