"""Runs a model's blocks one after the other: each by itself in the program, or equal ones in loops.

In a loop a program has one block for each kind, however many layers there are, so it compiles
fast, and on a mesh what one layer gathers is gone before the next one's.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from kd_jax.models.layers import PRODUCT
from kd_jax.models.model_config import ModelConfig, Run
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
    `config.scan`, equal blocks that follow each other, or a pattern of blocks that repeats itself,
    are one loop in the program, over stacked parameters; `config.stacked` tells that these are
    stacked already (`stack_blocks`). With
    `predecessors` (models/replacement.py) and `replaced_L` (bool), a block is replaced by its
    predecessors where that is False.
    """
    drawn = predecessors is not None and replaced_L is not None
    if config.stacked:
        runs, entries = config.stacked, iter(blocks)
    elif config.scan and not drawn:
        runs = repeats(blocks)
        own = (run.layers(i) for run in runs for i in range(run.period))
        entries = (_stacked([blocks[layer] for layer in layers]) for layers in own)
    else:
        runs, entries = [Run(layer, 1, 1) for layer in range(len(blocks))], iter(blocks)
    policy = jax.checkpoint_policies.save_only_these_names(PRODUCT) if config.remat_keeps else None

    def run(block: Any, x_BTD: Array, layer: Any) -> tuple[Array, Heads]:
        call = jax.checkpoint(block, policy=policy) if config.remat else block
        return call(x_BTD, mask, seed, 1 + sites * layer)

    hidden, attention = [x_BTD], []
    for each in runs:
        pattern, layer = list(itertools.islice(entries, each.period)), each.first
        if each.count == 1:
            (block,) = pattern
            if drawn and len(predecessors[layer]):
                block = Either(block, predecessors[layer], replaced_L[layer])
            x_BTD, heads = run(block, x_BTD, layer)
            outputs = [(x_BTD, heads)]
        else:
            x_BTD, outputs = _loop(run, pattern, x_BTD, each)
        hidden += [states_BTD for states_BTD, _ in outputs]
        attention += [heads for _, heads in outputs]
    return tuple(hidden), tuple(attention)


def _loop(run, pattern: list[nnx.Module], x_BTD: Array, all_of: Run) -> tuple[Array, list]:
    """Runs blocks whose parameters are stacked: (x_BTD, each layer's output and heads)."""
    graphdefs, params = zip(*map(nnx.split, pattern), strict=True)

    def step(x_BTD, own):
        layer, params = own
        outputs = []
        for number, pair in enumerate(zip(graphdefs, params, strict=True)):
            outputs.append(run(nnx.merge(*pair), x_BTD, layer + number))
            x_BTD = outputs[-1][0]
        return x_BTD, outputs

    layers = jnp.uint32(all_of.first) + jnp.arange(
        0, all_of.count * all_of.period, all_of.period, dtype=jnp.uint32
    )
    x_BTD, outputs = jax.lax.scan(step, x_BTD, (layers, params))
    each = [jax.tree.map(lambda x, i=i: x[i], outputs) for i in range(all_of.count)]
    return x_BTD, [output for outputs in each for output in outputs]


def repeats(blocks: Sequence[nnx.Module]) -> tuple[Run, ...]:
    """Groups blocks into runs of equal structure and shapes, or of a pattern of such blocks."""
    known, kinds, runs, first = [], [], [], 0
    for block in blocks:
        graphdef, params = nnx.split(block)
        shapes = jax.tree.map(lambda x: (x.shape, x.dtype), nnx.to_pure_dict(params))
        known.append((graphdef, shapes))
        kinds.append(known.index(known[-1]))
    while first < len(kinds):
        found = [Run(first, 1, 1)]
        for period in range(1, (len(kinds) - first) // 2 + 1):
            end = first + period
            while kinds[end : end + period] == kinds[first : first + period]:
                end += period
            if end > first + period:
                found.append(Run(first, period, (end - first) // period))
        runs.append(max(found, key=lambda run: run.period * run.count))  # the shortest of equals
        first += runs[-1].period * runs[-1].count
    return tuple(runs)


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
    if not config.stacked:
        yield from blocks
    entries = iter(blocks)
    for run in config.stacked:
        pattern = [nnx.split(block) for block in itertools.islice(entries, run.period)]
        for i in range(run.count):
            for graphdef, params in pattern:
                own = params if run.count == 1 else jax.tree.map(lambda x, i=i: x[i], params)
                yield nnx.merge(graphdef, own)
