"""Bisects the bits of numbers from 0 to 1, which are ordered as the numbers are.

So the border between those that fit and those that do not is found exactly, in thirty steps of sums
that may go over devices, and nothing is sorted.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from kd_jax.types import Array

_BEYOND = int(np.float32(1.0).view(np.int32)) + 1  # the bits of the number after 1


def border(holds: Callable[[Array], Array], shape: tuple[int, ...]) -> Array:
    """Finds the largest float32 numbers in [0, 1] of which `holds` is true; 0 where there are none.

    Args:
        holds: maps an array of numbers to bools of its shape; each is true up to some number and
            false beyond.
        shape: the shape of the numbers.
    """

    def halve(_, ends):
        low, high = ends  # it holds at `low`, and not at `high`
        middle = low + (high - low) // 2
        true = holds(jax.lax.bitcast_convert_type(middle, jnp.float32))
        return jnp.where(true, middle, low), jnp.where(true, high, middle)

    ends = jnp.zeros(shape, jnp.int32), jnp.full(shape, _BEYOND, jnp.int32)
    low, _ = jax.lax.fori_loop(0, _BEYOND.bit_length(), halve, ends)
    return jax.lax.bitcast_convert_type(low, jnp.float32)
