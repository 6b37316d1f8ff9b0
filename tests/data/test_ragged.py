"""Every item in one bin, no bin too full, few bins."""

import numpy as np
import pytest

from kd_jax.data.ragged import pack


@pytest.mark.parametrize("seed", range(5))
def test_items_are_packed_once_and_tightly(seed):
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 65, 300).tolist()
    bins = pack(lengths, 64)
    assert sorted(item for each in bins for item in each) == list(range(300))
    assert all(sum(lengths[item] for item in each) <= 64 for each in bins)
    assert len(bins) <= 1.05 * sum(lengths) / 64 + 1


def test_what_fits_exactly():
    assert pack([3, 5, 8, 1, 7], 8) == [[2], [4, 3], [1, 0]]
    assert pack([], 8) == []


def test_an_item_that_fits_nowhere():
    with pytest.raises(ValueError, match="item 1 of length 9 does not fit into 8"):
        pack([3, 9], 8)
