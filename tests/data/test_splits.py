import numpy as np
import pytest

from kd_jax.data import splits


@pytest.mark.parametrize("seed", range(4))
def test_every_class_gives_its_share(seed):
    labels = np.random.default_rng(seed).choice(3, 200, p=[0.7, 0.25, 0.05])
    chosen = splits.stratified(range(200), labels, 0.2, seed)
    assert chosen.sum() == 40
    for label in range(3):
        share = 0.2 * (labels == label).sum()
        assert abs(chosen[labels == label].sum() - share) <= 1
    assert (splits.stratified(range(200), labels, 0.2, seed) == chosen).all()
    assert (splits.stratified(range(200), labels, 0.2, seed + 1) != chosen).any()


def test_groups_stay_together():
    groups = [f"text {i % 30}" for i in range(90)]
    chosen = splits.stratified(groups, np.arange(90) % 2, 0.3, 0)
    assert (chosen[:30] == chosen[30:60]).all() and (chosen[:30] == chosen[60:]).all()
    assert chosen[:30].sum() == 9


def test_some_are_a_random_share_of_the_seed():
    chosen = splits.random_share(40, 0.1, seed=3)
    assert chosen.sum() == 4 and len(chosen) == 40
    assert (splits.random_share(40, 0.1, seed=3) == chosen).all()
    assert (splits.random_share(40, 0.1, seed=4) != chosen).any()
    assert not splits.random_share(1, 0.5, seed=0).any()


@pytest.mark.parametrize(
    "split",
    [
        lambda groups, share: splits.random_share(len(set(groups)), share, 0),
        lambda groups, share: splits.stratified(groups, np.zeros(len(groups)), share, 0),
        lambda groups, share: splits.grouped(groups, share, 0),
    ],
)
def test_something_is_set_aside_and_something_left(split):
    assert split(["a", "b"], 0.01).sum() == split(["a", "b"], 0.99).sum() == 1
    assert not split(["a", "a"], 0.5).any()


def test_whole_groups_until_the_share_is_reached():
    groups = [0] * 5 + [1] * 3 + [2] * 2 + [3] * 10
    for seed in range(8):
        chosen = splits.grouped(groups, 0.3, seed)
        whole = [g for g in range(4) if chosen[np.array(groups) == g].all()]
        assert chosen.sum() == sum(groups.count(g) for g in whole) >= 6
        assert len(whole) < 4
        assert (chosen == splits.grouped(groups, 0.3, seed)).all()
