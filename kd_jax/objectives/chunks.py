"""Rows cut into chunks of one size, so that what is computed of a row exists for one at a time."""

from typing import Any

import jax
import jax.numpy as jnp


def split(rows: Any, size: int) -> Any:
    """Arrays (N, ...) as (chunks, size, ...), filled up with zeros; a pytree of them likewise."""

    def cut(array):
        padding = [(0, -len(array) % size)] + [(0, 0)] * (array.ndim - 1)
        return jnp.pad(array, padding).reshape(-1, size, *array.shape[1:])

    return jax.tree.map(cut, rows)
