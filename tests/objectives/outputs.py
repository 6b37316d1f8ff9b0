"""Batches and model outputs made of random numbers, without any model."""

import jax
import numpy as np

from kd_jax.types import Batch, Heads, ModelOutput

ROWS, LENGTH, VOCAB = 4, 6, 13


def batch(positions: bool = False, seed: int = 0) -> Batch:
    """Row 1 is half padding. With `positions`, three slots a row, of which the last is unused."""
    rng = np.random.default_rng(seed)
    mask = np.ones((ROWS, LENGTH), np.float32)
    mask[1, 3:] = 0
    tokens = rng.integers(0, VOCAB, (ROWS, LENGTH)).astype(np.int32)
    if positions:
        at = np.array([[0, 4, 0], [2, 1, 0], [5, 3, 0], [3, 0, 0]], np.int32)
        labels = rng.integers(1, VOCAB, at.shape).astype(np.int32)
        weights = np.ones(at.shape, np.float32)
        weights[:, 2] = 0
    else:
        at, labels, weights = None, (tokens + 1) % VOCAB, mask.copy()
        weights[:, -1] = 0
    arrays = dict(tokens_BT=tokens, mask_BT=mask, labels=labels, weights=weights, positions_BP=at)
    arrays = {name: None if x is None else jax.device_put(x) for name, x in arrays.items()}
    return Batch(ids_B=jax.device_put(np.arange(ROWS, dtype=np.int32)), **arrays)


def output(
    like: Batch, layers: int, width: int, seed: int, vocab_size: int = VOCAB, heads: int = 1
) -> ModelOutput:
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return jax.device_put(rng.normal(size=shape).astype(np.float32))

    return ModelOutput(
        features=draw(*like.labels.shape, width),
        unembed_VD=draw(vocab_size, width),
        bias_V=draw(vocab_size),
        hidden=tuple(draw(ROWS, LENGTH, width) for _ in range(layers + 1)),
        attention=tuple(
            Heads(*(draw(ROWS, LENGTH, heads, width // heads) for _ in range(3)))
            for _ in range(layers)
        ),
    )
