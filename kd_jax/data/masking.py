"""Masks tokens: chooses the tokens of a row that are predicted, and what replaces them.

Masks are drawn anew in every epoch and are a function of (seed, epoch, index of the row) alone:
neither the batch size, nor the number of processes, nor a restart changes them.
"""

import dataclasses
import functools
import math
import threading

import numpy as np

from kd_jax.errors import UserError
from kd_jax.ranges import Choice, Real, settings

DEFAULTS = dict(
    rate=Real(above=0, below=1, default=0.15),
    mode=Choice("exact", "bernoulli"),
    whole_word=False,
    mask=Real(least=0, most=1, default=0.8),
    random=Real(least=0, most=1, default=0.1),
)


def slots(seq_len: int, rate: float) -> int:
    """Computes P, the number of predicted positions that a row has room for: ceil(rate * seq_len),
    rounded up to a multiple of 8."""
    return 8 * math.ceil(math.ceil(rate * seq_len) / 8)


def uniforms(seed: int, epochs_B: np.ndarray, ids_B: np.ndarray, count: int) -> np.ndarray:
    """Draws uniform float64 (B, count) in [0, 1): row b depends on (seed, epochs[b], ids[b])."""
    uniforms_BU = np.empty((len(ids_B), count))
    philox = np.random.Philox(key=0)
    generator, state = np.random.Generator(philox), philox.state
    for row, epoch, index in zip(uniforms_BU, epochs_B.tolist(), ids_B.tolist(), strict=True):
        state["state"]["key"][:] = _key(seed, epoch), index
        philox.state = state  # the same as Philox(key=...) anew, but faster
        generator.random(out=row)
    return uniforms_BU


@functools.lru_cache(maxsize=64)
def _key(seed: int, epoch: int) -> int:
    return int(np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64)[0])


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The facts about a tokenizer's vocabulary that masking needs."""

    mask_id: int
    maskable_V: np.ndarray  # bool, False for special tokens
    starts_V: np.ndarray  # bool, True for tokens that begin a word


class Masking:
    """BERT's masking (Devlin et al. 2018, section 3.1) of whole batches.

    Settings (config.task.masking):
        rate        share of the maskable tokens (all but special tokens and padding)
        mode        "exact": n = max(1, round(rate * maskable)) of them, without replacement
                    (halves round to even);
                    "bernoulli": each with probability `rate`; what exceeds the row's slots is
                    left unmasked, and counted: `dropped` of `selected`, since the process began
        whole_word  units are words, not tokens; a word that would overflow is skipped
        mask        share of the chosen tokens that [MASK] replaces
        random      share that a random token replaces, never a special one; the rest stay
    """

    def __init__(self, config, vocabulary: Vocabulary | None, seq_len: int) -> None:
        given = settings(config, DEFAULTS, "task.masking")
        self.rate, self.mode, self.whole_word = given["rate"], given["mode"], given["whole_word"]
        self.mask, self.random = given["mask"], given["random"]
        if self.mask + self.random > 1:
            raise UserError(
                f"config.task.masking: mask + random = {self.mask + self.random} must be at most 1"
            )
        self.slots = slots(seq_len, self.rate)
        self.vocabulary = vocabulary
        self.selected = self.dropped = 0
        self._lock = threading.Lock()  # batches are made by several threads

    def __call__(
        self, tokens_BT: np.ndarray, mask_BT: np.ndarray, uniforms_BU: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Masks rows: returns (masked tokens (B, T), positions, labels, weights (B, P)).

        `uniforms_BU`: U >= T + 2 P numbers a row. Positions ascend; unused slots stand last, with
        position 0, label 0 and weight 0.
        """
        T, P = tokens_BT.shape[1], self.slots
        maskable_BT = mask_BT.astype(bool) & self.vocabulary.maskable_V[tokens_BT]
        choose = self._words if self.whole_word else self._tokens
        chosen_BT = choose(tokens_BT, maskable_BT, uniforms_BU[:, :T])
        # A stable sort of "not chosen" puts the chosen positions first, in ascending order.
        positions_BP = np.argsort(~chosen_BT, axis=1, kind="stable")[:, :P]
        positions_BP = np.pad(positions_BP, ((0, 0), (0, P - positions_BP.shape[1])))
        used_BP = np.arange(P) < chosen_BT.sum(axis=1, keepdims=True)
        positions_BP = np.where(used_BP, positions_BP, 0)
        labels_BP = np.where(used_BP, np.take_along_axis(tokens_BT, positions_BP, axis=1), 0)
        shown_BP = self._shown(labels_BP, uniforms_BU[:, T : T + P], uniforms_BU[:, T + P :][:, :P])
        masked_BT = tokens_BT.copy()
        rows_BP = np.broadcast_to(np.arange(len(tokens_BT))[:, None], used_BP.shape)
        masked_BT[rows_BP[used_BP], positions_BP[used_BP]] = shown_BP[used_BP]
        return (
            masked_BT.astype(np.int32),
            positions_BP.astype(np.int32),
            labels_BP.astype(np.int32),
            used_BP.astype(np.float32),
        )

    def _budget(self, maskable_BT):
        """Counts the tokens to choose in each row, (B, 1)."""
        maskable_B1 = maskable_BT.sum(axis=1, keepdims=True)
        return np.maximum(1, np.rint(self.rate * maskable_B1)).astype(int)

    def _tokens(self, tokens_BT, maskable_BT, uniforms_BT):
        keys_BT = np.where(maskable_BT, uniforms_BT, 2.0)
        if self.mode == "exact":
            budget_B1 = self._budget(maskable_BT)
        else:
            selected_B1 = (keys_BT < self.rate).sum(axis=1, keepdims=True)
            budget_B1 = np.minimum(selected_B1, self.slots)
            self._count(selected_B1.sum(), (selected_B1 - budget_B1).sum())
        last_B1 = np.take_along_axis(np.sort(keys_BT, axis=1), np.maximum(budget_B1 - 1, 0), axis=1)
        return maskable_BT & (keys_BT <= last_B1) & (budget_B1 > 0)

    def _words(self, tokens_BT, maskable_BT, uniforms_BT):
        starts_BT = maskable_BT & self.vocabulary.starts_V[tokens_BT]
        starts_BT[:, 1:] |= maskable_BT[:, 1:] & ~maskable_BT[:, :-1]
        words_BT = np.where(maskable_BT, np.cumsum(starts_BT, axis=1) - 1, -1)
        budget_B1 = self._budget(maskable_BT)
        chosen_BT = np.zeros_like(maskable_BT)
        for row, words_T in enumerate(words_BT):
            sizes = np.bincount(words_T[words_T >= 0])
            keys = uniforms_BT[row, : len(sizes)]
            order = np.argsort(keys)
            if self.mode == "exact":
                left = int(budget_B1[row, 0])
            else:
                order = order[keys[order] < self.rate]
                left = self.slots
            taken = np.zeros(len(sizes) + 1, bool)  # the last entry is for words_T == -1
            sizes_in_order = sizes[order].tolist()
            for word, size in zip(order.tolist(), sizes_in_order, strict=True):
                if size <= left:
                    taken[word] = True
                    left -= size
                if not left:
                    break
            chosen_BT[row] = taken[words_T]
            if self.mode == "bernoulli":
                self._count(sum(sizes_in_order), sum(sizes_in_order) - (self.slots - left))
        return chosen_BT

    def _shown(self, labels_BP, action_BP, choice_BP):
        """Chooses the input at masked positions: [MASK], a random token, or the token itself."""
        candidates = np.flatnonzero(self.vocabulary.maskable_V)
        random_BP = candidates[(choice_BP * len(candidates)).astype(int)]
        shown_BP = np.where(action_BP < self.mask + self.random, random_BP, labels_BP)
        return np.where(action_BP < self.mask, self.vocabulary.mask_id, shown_BP)

    def _count(self, selected, dropped):
        with self._lock:
            self.selected += int(selected)
            self.dropped += int(dropped)
