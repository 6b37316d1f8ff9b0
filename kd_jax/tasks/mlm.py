"""Masked language modelling on blocks of text (BERT, Devlin et al. 2018; without sentence pairs).

A row is [CLS], seq_len - 2 tokens of text, [SEP]; the text runs on from block to block and from
document to document, with a [SEP] between two documents (FULL-SENTENCES of RoBERTa, Liu et al.
2019). config.task: name, seq_len, masking (data/masking.py).
"""

import functools

import numpy as np

from kd_jax.data import tokenizers
from kd_jax.data.blocks import Blocks
from kd_jax.data.masking import Masking, uniforms
from kd_jax.ranges import Whole
from kd_jax.tasks.language import TextTask
from kd_jax.tasks.task import batch_shapes
from kd_jax.types import Batch

DEFAULTS = dict(name="mlm", seq_len=Whole(least=4, default=128), masking=None)


class MaskedLM(TextTask):
    """Masked language modelling; labels and weights are (B, P), one for each masked position, P as
    in data/masking.py."""

    head, defaults = "mlm", DEFAULTS
    redraws = True

    def __init__(self, config, data, tokenizer) -> None:
        super().__init__(config, data, tokenizer)
        vocabulary = None if tokenizer is None else tokenizers.vocabulary(tokenizer)
        self.masking = Masking(self.config["masking"], vocabulary, self.seq_len)

    def shapes(self, batch_size):
        slots = self.masking.slots
        return batch_shapes(batch_size, self.seq_len, slots, positions_BP=slots)

    @functools.cached_property
    def _special(self) -> tuple[int, int, int]:
        names = ("cls_token", "sep_token", "pad_token")
        return tuple(
            tokenizers.token_id(self.tokenizer, n, "masked language modelling") for n in names
        )

    @property
    def _separator(self) -> int:
        return self._special[1]

    def _blocks(self, tokens_N, partial):
        return Blocks(tokens_N, self.seq_len - 2, self.seq_len - 2, partial)

    def _make(self, cut, seed, ids_B, epochs_B):
        cls, sep, pad = self._special
        text_BW, valid_BW = cut.rows(ids_B)
        T, P = self.seq_len, self.masking.slots
        length_B1 = valid_BW.sum(axis=1, keepdims=True) + 2
        tokens_BT = np.full((len(ids_B), T), pad, np.int32)
        tokens_BT[:, 0] = cls
        tokens_BT[:, 1:-1] = np.where(valid_BW, text_BW, pad)
        np.put_along_axis(tokens_BT, length_B1 - 1, sep, axis=1)
        mask_BT = (np.arange(T) < length_B1).astype(np.float32)
        masked_BT, positions_BP, labels_BP, weights_BP = self.masking(
            tokens_BT, mask_BT, uniforms(seed, epochs_B, ids_B, T + 2 * P)
        )
        return Batch(
            ids_B=ids_B.astype(np.int32),
            tokens_BT=masked_BT,
            mask_BT=mask_BT,
            labels=labels_BP,
            weights=weights_BP,
            positions_BP=positions_BP,
        )


make = MaskedLM
