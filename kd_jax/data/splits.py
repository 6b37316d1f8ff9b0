"""Which rows of a split are set aside: functions of the data, the share and the seed."""

from collections.abc import Hashable, Sequence

import numpy as np


def stratified(
    groups: Sequence[Hashable], labels_N: np.ndarray, share: float, seed: int
) -> np.ndarray:
    """bool (N,): about `share` of the rows, of each class as nearly as whole rows allow, at least
    one row in all. Rows of one group (the same text, for instance) stay together; a group counts
    as one row of its first row's class. Where there is one group, nothing is set aside."""
    _, first_G, group_N = np.unique(_numbers(groups), return_index=True, return_inverse=True)
    _, class_G = np.unique(np.asarray(labels_N)[first_G], return_inverse=True)
    count = len(first_G)
    random = np.random.Generator(np.random.Philox(seed))
    order_G = random.permutation(count)
    # Every class's rows get evenly spaced places in [0, 1); the first `share` of all is taken.
    place_G = np.empty(count)
    for label in range(class_G.max() + 1):
        rows = order_G[class_G[order_G] == label]
        place_G[rows] = (np.arange(len(rows)) + random.random()) / len(rows)
    chosen_G = np.zeros(count, bool)
    size = min(max(1, round(share * count)), count - 1)
    chosen_G[np.argsort(place_G, kind="stable")[:size]] = True
    return chosen_G[group_N]


def grouped(groups: Sequence[Hashable], share: float, seed: int) -> np.ndarray:
    """bool (N,): whole groups in random order, until they hold at least `share` of the rows; one
    group is always left out. Where there is one group, nothing is set aside."""
    group_N = _numbers(groups)
    sizes_G = np.bincount(group_N)
    order_G = np.random.Generator(np.random.Philox(seed)).permutation(len(sizes_G))
    before_G = np.cumsum(sizes_G[order_G]) - sizes_G[order_G]
    chosen_G = order_G[before_G < share * len(group_N)][: len(sizes_G) - 1]
    return np.isin(group_N, chosen_G)


def _numbers(groups) -> np.ndarray:
    """Groups numbered in the order in which they appear."""
    numbers: dict = {}
    return np.array([numbers.setdefault(group, len(numbers)) for group in groups])
