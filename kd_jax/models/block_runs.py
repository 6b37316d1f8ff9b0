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

    `mask` is passed to the blocks: a boolean array, or an `attention.Scope`. A block takes `sites`
    dropout sites, starting at 1. With `config.remat`, blocks are recomputed in the backward pass.
    With `config.scan`, equal blocks that follow each other are one loop in the program, over their
    stacked parameters; `config.stacked` tells that these are stacked already (`stack_blocks`). With
    `predecessors` (models/replacement.py) and `replaced_L` (bool), a block is replaced by its
    predecessors where that is False.
    """
    hidden, attention = [x_BTD], []

    def run(block: nnx.Module, x_BTD: Array, first: Any) -> tuple[Array, Heads]:
        call = block if not config.remat else jax.checkpoint(block, policy=_kept(config))
        return call(x_BTD, mask, seed, 1 + sites * first)

    if config.stacked:
        runs = zip(blocks, config.stacked, strict=True)
        split = [(*nnx.split(block), count) for block, count in runs]
    elif config.scan and replaced_L is None:
        split = [(*stacked(group), len(group)) for group in equal_runs(blocks)]
    else:
        split = []
        for i, block in enumerate(blocks):
            if predecessors is not None and replaced_L is not None and len(predecessors[i]):
                block = Either(block, predecessors[i], replaced_L[i])
            x_BTD, heads = run(block, x_BTD, i)
            hidden.append(x_BTD)
            attention.append(heads)
    for graphdef, params, count in split:
        first = len(attention)
        if count == 1:
            x_BTD, heads = run(nnx.merge(graphdef, params), x_BTD, first)
            hidden, attention = [*hidden, x_BTD], [*attention, heads]
            continue

        def layer(x_BTD, own, graphdef=graphdef):
            number, params = own
            x_BTD, heads = run(nnx.merge(graphdef, params), x_BTD, number)
            return x_BTD, (x_BTD, heads)

        numbers = first + jnp.arange(count, dtype=jnp.uint32)
        x_BTD, outputs = jax.lax.scan(layer, x_BTD, (numbers, params))
        of_layer = [jax.tree.map(lambda x, i=i: x[i], outputs) for i in range(count)]
        hidden += [states for states, _ in of_layer]
        attention += [heads for _, heads in of_layer]
    return tuple(hidden), tuple(attention)


def _kept(config: ModelConfig) -> Any:
    """Chooses what `jax.checkpoint` keeps: nothing (None), or the results of linear layers."""
    if not config.remat_keeps:
        return None
    return jax.checkpoint_policies.save_only_these_names(PRODUCT)


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


def each_block(blocks: Sequence[nnx.Module], config: ModelConfig) -> Iterator[nnx.Module]:
    """Yields every layer's block, also of stacked ones."""
    for block, count in zip(blocks, config.stacked or (1,) * len(blocks), strict=True):
        graphdef, params = nnx.split(block)
        for i in range(count):
            own = params if count == 1 else jax.tree.map(lambda x, i=i: x[i], params)
            yield nnx.merge(graphdef, own)


def stacked(blocks: Sequence[nnx.Module]) -> tuple[nnx.GraphDef, Any]:
    """Stacks the parameters of equal blocks, layers on the first axis: (structure of one, state);
    those of a single block stay as they are."""
    graphdef, params = nnx.split(blocks[0])
    if len(blocks) > 1:
        params = jax.tree.map(lambda *x: jnp.stack(x), *(nnx.split(block)[1] for block in blocks))
    return graphdef, params
