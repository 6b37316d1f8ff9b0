import math

import numpy as np
import pytest

from kd_jax.data.masking import Masking, Vocabulary, slots, uniforms
from kd_jax.errors import UserError

V, MASK, PAD = 50, 4, 0
SPECIAL = [PAD, 1, 2, 3, MASK]


def vocabulary():
    maskable_V = np.ones(V, bool)
    maskable_V[SPECIAL] = False
    return Vocabulary(MASK, maskable_V, starts_V=np.arange(V) < 30)  # 30.. continue a word


def rows(count, length, real=None, low=5, high=V):
    """Rows [2] tokens [3], the text ending behind `real` tokens."""
    real = length - 2 if real is None else real
    tokens_BT = np.random.default_rng(0).integers(low, high, (count, length)).astype(np.int32)
    tokens_BT[:, 0], tokens_BT[:, real + 1], tokens_BT[:, real + 2 :] = 2, 3, PAD
    return tokens_BT, np.tile(np.arange(length) < real + 2, (count, 1)).astype(np.float32)


def masked(tokens_BT, mask_BT, seed=0, epoch=0, ids_B=None, **config):
    T = tokens_BT.shape[1]
    masking = Masking(config, vocabulary(), T)
    ids_B = np.arange(len(tokens_BT)) if ids_B is None else ids_B
    u = uniforms(seed, np.full(len(ids_B), epoch), ids_B, T + 2 * masking.slots)
    return masking, masking(tokens_BT, mask_BT, u)


@pytest.mark.parametrize("length, want", [(128, 24), (512, 80), (20, 8), (60, 16), (6, 8)])
def test_slots(length, want):
    assert slots(length, 0.15) == want


@pytest.mark.parametrize("whole_word", [False, True])
@pytest.mark.parametrize("mode", ["exact", "bernoulli"])
def test_masks_are_a_function_of_seed_epoch_and_index_alone(mode, whole_word):
    tokens_BT, mask_BT = rows(32, 40)
    config = dict(mode=mode, whole_word=whole_word)
    _, whole = masked(tokens_BT, mask_BT, **config)
    order = np.random.default_rng(1).permutation(32)[:9]
    _, part = masked(tokens_BT[order], mask_BT[order], ids_B=order, **config)
    for a, b in zip(whole, part, strict=True):
        assert (a[order] == b).all()
    for change in (dict(seed=1), dict(epoch=1), dict(ids_B=np.arange(1, 33))):
        _, other = masked(tokens_BT, mask_BT, **config, **change)
        assert (whole[1] != other[1]).any(axis=1).mean() > 0.9, change


def test_uniforms_of_neighbours_are_unlike():
    u = np.concatenate(
        [uniforms(s, np.full(50, e), np.arange(50), 64) for s, e in ((0, 0), (0, 1))]
    )
    assert len(np.unique(u)) == u.size and 0 <= u.min() and u.max() < 1
    correlation = np.corrcoef(u) - np.eye(len(u))
    assert np.abs(correlation).max() < 0.6 and abs(u.mean() - 0.5) < 0.02
    fresh = np.random.Generator(np.random.Philox(key=(_key(0, 1), 7))).random(64)
    assert (u[57] == fresh).all()


def _key(seed, epoch):
    return int(np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64)[0])


@pytest.mark.parametrize("real", [0, 1, 3, 10, 38])
def test_exact_number_of_distinct_maskable_positions(real):
    tokens_BT, mask_BT = rows(64, 40, real)
    _, (masked_BT, positions_BP, labels_BP, weights_BP) = masked(tokens_BT, mask_BT)
    want = max(1, round(0.15 * real)) if real else 0
    assert positions_BP.shape == labels_BP.shape == weights_BP.shape == (64, 8)
    assert (weights_BP.sum(axis=1) == want).all()
    assert (weights_BP[:, :want] == 1).all()  # used slots stand first
    used_BP = positions_BP[:, :want]
    assert (np.diff(used_BP, axis=1) > 0).all() and (used_BP >= 1).all() and (used_BP <= real).all()
    assert (labels_BP[:, :want] == np.take_along_axis(tokens_BT, used_BP, axis=1)).all()
    assert (labels_BP[:, want:] == 0).all() and (positions_BP[:, want:] == 0).all()
    changed_BT = masked_BT != tokens_BT
    np.put_along_axis(changed_BT, used_BP, False, axis=1)
    assert not changed_BT.any()  # nothing else is touched


def test_special_tokens_within_the_text_are_never_masked():
    tokens_BT, mask_BT = rows(64, 40, low=0, high=10)
    _, (_, _, labels_BP, weights_BP) = masked(tokens_BT, mask_BT)
    assert not np.isin(labels_BP[weights_BP > 0], SPECIAL).any()
    maskable_B = (~np.isin(tokens_BT, SPECIAL)).sum(axis=1)
    assert (weights_BP.sum(axis=1) == np.maximum(1, np.rint(0.15 * maskable_B))).all()


def test_every_position_is_equally_likely():
    tokens_BT, mask_BT = rows(4000, 22)
    _, (_, positions_BP, _, weights_BP) = masked(tokens_BT, mask_BT)  # 3 of 20
    counts = np.bincount(positions_BP[weights_BP > 0], minlength=22)[1:-1]
    assert counts.sum() == 12000
    assert np.abs(counts - 600).max() < 5 * math.sqrt(600)


def test_eighty_ten_ten():
    tokens_BT, mask_BT = rows(2000, 128)
    _, (masked_BT, positions_BP, labels_BP, weights_BP) = masked(tokens_BT, mask_BT)
    used_BP = weights_BP > 0
    shown = np.take_along_axis(masked_BT, positions_BP, axis=1)[used_BP]
    labels = labels_BP[used_BP]
    assert abs((shown == MASK).mean() - 0.8) < 0.01
    # A random token is the token itself once in 45.
    assert abs((shown == labels).mean() - (0.1 + 0.1 / 45)) < 0.01
    random = shown[(shown != MASK) & (shown != labels)]
    assert set(random) == set(range(5, V))
    assert np.bincount(random)[5:].min() > 0.5 * len(random) / 45


def test_fractions_are_settings():
    tokens_BT, mask_BT = rows(50, 40)
    _, (masked_BT, positions_BP, labels_BP, weights_BP) = masked(
        tokens_BT, mask_BT, mask=0.0, random=0.0
    )
    assert (masked_BT == tokens_BT).all() and weights_BP.sum() > 0
    _, (masked_BT, positions_BP, _, weights_BP) = masked(tokens_BT, mask_BT, mask=1.0, random=0.0)
    shown_BP = np.take_along_axis(masked_BT, positions_BP, axis=1)
    assert (shown_BP[weights_BP > 0] == MASK).all()


def test_bernoulli_counts_what_does_not_fit():
    tokens_BT, mask_BT = rows(3000, 128)
    masking, (_, positions_BP, _, weights_BP) = masked(tokens_BT, mask_BT, mode="bernoulli")
    kept = weights_BP.sum(axis=1)
    assert masking.selected - masking.dropped == kept.sum()
    assert masking.dropped > 0 and kept.max() == 24 and kept.min() < 15
    assert abs(masking.selected / (3000 * 126) - 0.15) < 0.003
    # Expected overflow of a binomial(126, 0.15) above 24.
    chance = [math.comb(126, k) * 0.15**k * 0.85 ** (126 - k) for k in range(127)]
    expected = sum(p * max(0, k - 24) for k, p in enumerate(chance)) * 3000
    assert abs(masking.dropped - expected) < 0.15 * expected
    # What is dropped does not depend on where it stands.
    full = positions_BP[kept == 24].ravel()
    assert abs(full.mean() - 63.5) < 3


def test_bernoulli_may_choose_nothing():
    tokens_BT, mask_BT = rows(2000, 12)
    masking, (_, _, _, weights_BP) = masked(tokens_BT, mask_BT, mode="bernoulli", rate=0.05)
    chosen_B = weights_BP.sum(axis=1)
    assert abs((chosen_B == 0).mean() - 0.95**10) < 0.04
    assert chosen_B.sum() == masking.selected and masking.dropped == 0


def words_of(tokens_T):
    """Lists of positions: words begin at tokens below 30, or behind a special token."""
    words = []
    for t, token in enumerate(tokens_T):
        if token < 5:
            continue
        if token < 30 or tokens_T[t - 1] < 5:
            words.append([])
        words[-1].append(t)
    return words


@pytest.mark.parametrize("mode", ["exact", "bernoulli"])
def test_whole_words_are_masked_wholly_and_never_overflow(mode):
    tokens_BT, mask_BT = rows(200, 64)
    masking, (_, positions_BP, labels_BP, weights_BP) = masked(
        tokens_BT, mask_BT, mode=mode, whole_word=True
    )
    budget = 9 if mode == "exact" else 16
    used_B = weights_BP.sum(axis=1)
    assert used_B.max() == budget
    if mode == "exact":
        assert used_B.mean() > 8.8  # skipped words make room for shorter ones
    for row in range(200):
        chosen = set(positions_BP[row][weights_BP[row] > 0].tolist())
        for word in words_of(tokens_BT[row]):
            assert len(chosen & set(word)) in (0, len(word))
    if mode == "bernoulli":
        assert masking.selected - masking.dropped == used_B.sum() and masking.dropped > 0
        assert abs(masking.selected / (200 * 62) - 0.15) < 0.01


def test_a_word_that_would_overflow_is_skipped():
    tokens_BT = np.array([[2, 5, 30, 31, 32, 6, 3, 0]], np.int32)  # words of 4 and of 1 token
    mask_BT = (tokens_BT > 0).astype(np.float32)
    for seed in range(20):
        _, (_, positions_BP, _, weights_BP) = masked(tokens_BT, mask_BT, seed=seed, whole_word=True)
        assert weights_BP.sum() == 1 and positions_BP[0, 0] == 5  # n = max(1, round(0.15 * 5))


def test_words_begin_behind_special_tokens():
    tokens_BT = np.array([[2, 30, 31, 1, 32, 3]], np.int32)  # 30.. continue a word
    found = set()
    for seed in range(40):
        _, (_, positions_BP, _, weights_BP) = masked(
            tokens_BT, np.ones((1, 6), np.float32), seed=seed, whole_word=True, rate=0.6
        )
        found.add(tuple(positions_BP[weights_BP > 0].tolist()))
    assert found == {(1, 2), (4,)}  # n = 2


def test_mistakes_in_the_config():
    for config, message in (
        (dict(mode="fixed"), "masking.mode='fixed': have exact, bernoulli"),
        (dict(rate=15), "masking.rate=15 must be above 0 and below 1"),
        (dict(mask=0.9, random=0.2), "mask . random"),
        (dict(whole_words=True), "masking.whole_words .did you mean 'whole_word'"),
    ):
        with pytest.raises(UserError, match=message):
            Masking(config, None, 128)
