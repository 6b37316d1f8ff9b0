import jax.numpy as jnp
import pytest

from kd_jax.models.flash import Kernels


def kernels(length, before=None, after=0):
    return Kernels(length, length if before is None else before, after, 0.0, "bfloat16")


@pytest.mark.parametrize(
    "length, padded, block",
    [(1, 128, 128), (384, 384, 384), (1000, 1024, 512), (1100, 1152, 384), (4096, 4096, 512)],
)
def test_sizes(length, padded, block):
    made = kernels(length)
    assert (made.padded, made.block) == (padded, block)


@pytest.mark.parametrize(
    ("before", "after"),
    [*((n, 0) for n in (2048, 0, 1, 511, 512, 513, 1024, 5000))]
    + [(0, 2048), (2048, 2048), (1, 1), (64, 64), (512, 512), (513, 513), (700, 1)],
)
def test_blocks_that_nobody_sees_are_skipped_and_no_others(before, after):
    made = kernels(2048, before, after)
    seen = set()
    for i in range(4):
        for j in range(4):
            nearest = 512 * abs(i - j) - 511  # between the nearest query and key
            if i == j or nearest <= (before if j < i else after):
                seen.add((i, j))
    steps = range(made.steps)
    of_queries = {
        (i, int(made.keys(i, s)[0])) for i in range(4) for s in steps if made.keys(i, s)[1]
    }
    of_keys = {
        (int(made.queries(j, s)[0]), j) for j in range(4) for s in steps if made.queries(j, s)[1]
    }
    assert of_queries == of_keys == seen
    assert made.pairs == len(seen) * 512**2


def test_cost():
    x = jnp.zeros((2, 3, 2048, 64), jnp.bfloat16)
    assert kernels(2048, after=2048).cost(2, 6, x).flops == 2 * 2 * 6 * 2048**2 * 64
    assert kernels(2048).cost(2, 6, x).flops == 2 * 2 * 6 * 2048**2 * 64 * 10 / 16
    assert kernels(2048).cost(2, 6, x, x).bytes_accessed == 2 * 2 * 2 * 3 * 2048 * 64
