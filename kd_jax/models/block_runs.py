"""Runs a model's blocks one after the other: each by itself in the program, or equal ones in loops.

In a loop a program has one block for each kind, however many layers there are, so it compiles
fast, and on a mesh what one layer gathers is gone before the next one's.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from kd_jax.models.layers import PRODUCT
from kd_jax.models.model_config import ModelConfig
from kd_jax.models.replacement import Either
from kd_jax.types import Array, Heads

Layers = tuple[tuple[Array, ...], tuple[Heads, ...]]  # (hidden, attention) of `ModelOutput`


def run_blocks(
    blocks: Sequence[nnx.Module],
    x_BTD: Array,
    mask: Any,
    seed: Array | None,
    sites: int,
    config: ModelConfig,
    predecessors: Any = None,
    replaced_L: Array | None = None,
) -> Layers:
    """Runs blocks one after the other: (x_BTD and each block's output, each block's heads).

    `mask`, an `attention.Scope`, is passed to the blocks. A block takes `sites` dropout sites,
    starting at 1. With `config.remat`, blocks are recomputed in the backward pass. With
    `config.scan`, equal blocks that follow each other are one loop in the program, over their
    stacked parameters; `config.stacked` tells that these are stacked already (`stack_blocks`). With
    `predecessors` (models/replacement.py) and `replaced_L` (bool), a block is replaced by its
    predecessors where that is False.
    """
    drawn = predecessors is not None and replaced_L is not None
    if config.stacked:
        runs = list(zip(blocks, config.stacked, strict=True))
    elif config.scan and not drawn:
        runs = [(_stacked(group), len(group)) for group in equal_runs(blocks)]
    else:
        runs = [(block, 1) for block in blocks]
    policy = jax.checkpoint_policies.save_only_these_names(PRODUCT) if config.remat_keeps else None

    def run(block: Any, x_BTD: Array, layer: Any) -> tuple[Array, Heads]:
        call = jax.checkpoint(block, policy=policy) if config.remat else block
        return call(x_BTD, mask, seed, 1 + sites * layer)

    hidden, attention = [x_BTD], []
    for block, count in runs:
        layer = len(attention)
        if count == 1:
            if drawn and len(predecessors[layer]):
                block = Either(block, predecessors[layer], replaced_L[layer])
            x_BTD, heads = run(block, x_BTD, layer)
            outputs = [(x_BTD, heads)]
        else:
            x_BTD, outputs = _loop(run, block, x_BTD, layer, count)
        hidden += [states_BTD for states_BTD, _ in outputs]
        attention += [heads for _, heads in outputs]
    return tuple(hidden), tuple(attention)


def _loop(run, block: nnx.Module, x_BTD: Array, first: int, count: int) -> tuple[Array, list]:
    """Runs `count` blocks, whose parameters are stacked: (x_BTD, each layer's output and heads)."""
    graphdef, params = nnx.split(block)

    def step(x_BTD, own):
        layer, params = own
        output = run(nnx.merge(graphdef, params), x_BTD, layer)
        return output[0], output

    layers = jnp.uint32(first) + jnp.arange(count, dtype=jnp.uint32)
    x_BTD, outputs = jax.lax.scan(step, x_BTD, (layers, params))
    return x_BTD, [jax.tree.map(lambda x, i=i: x[i], outputs) for i in range(count)]


def equal_runs(blocks: Sequence[nnx.Module]) -> list[list[nnx.Module]]:
    """Groups consecutive blocks of the same structure and shapes."""
    runs, last = [], None
    for block in blocks:
        graphdef, params = nnx.split(block)
        kind = graphdef, jax.tree.map(lambda x: (x.shape, x.dtype), nnx.to_pure_dict(params))
        if kind == last:
            runs[-1].append(block)
        else:
            runs.append([block])
        last = kind
    return runs


def _stacked(blocks: Sequence[nnx.Module]) -> nnx.Module:
    """Stacks the parameters of equal blocks, layers on the first axis; a single one stays as it
    is."""
    if len(blocks) == 1:
        return blocks[0]
    graphdef, params = nnx.split(blocks[0])
    every = [params, *(nnx.split(block)[1] for block in blocks[1:])]
    return nnx.merge(graphdef, jax.tree.map(lambda *parts: jnp.stack(parts), *every))


def each_block(blocks: Sequence[nnx.Module], config: ModelConfig) -> Iterator[nnx.Module]:
    """Yields every layer's block, also of stacked ones."""
    for block, count in zip(blocks, config.stacked or (1,) * len(blocks), strict=True):
        graphdef, params = nnx.split(block)
        for i in range(count):
            own = params if count == 1 else jax.tree.map(lambda x, i=i: x[i], params)
            yield nnx.merge(graphdef, own)
