"""Causal language modelling on blocks of text (GPT-2, Radford et al. 2019).

Documents are joined by one token: the end of text (GPT-2's <|endoftext|>), or the beginning of text
for models that were trained with <s> before every text and never </s>. Row i holds the tokens
[i T, (i + 1) T) of the text and the labels [i T + 1, (i + 1) T + 1): labels are shifted here and
nowhere else, and each token but the very first of the text is predicted exactly once. config.task:
name, seq_len, separator (eos | bos).
"""

import functools
import logging

import numpy as np

from kd_jax.data import tokenizers
from kd_jax.data.blocks import Blocks
from kd_jax.data.encoded import Beginnings
from kd_jax.ranges import Choice, Whole
from kd_jax.tasks.language import TextTask
from kd_jax.tasks.task import batch_shapes
from kd_jax.types import Batch

log = logging.getLogger(__name__)

DEFAULTS = dict(name="clm", seq_len=Whole(least=4, default=128), separator=Choice("eos", "bos"))


class CausalLM(TextTask):
    """Causal language modelling; batches have a label and a weight for every token, (B, T)."""

    head, defaults = "clm", DEFAULTS

    def __init__(self, config, data, tokenizer) -> None:
        super().__init__(config, data, tokenizer)
        self.separator = self.config["separator"]

    def shapes(self, batch_size):
        return batch_shapes(batch_size, self.seq_len, self.seq_len)

    def prepare(self):
        own = tokenizers.own_separator(self.tokenizer)
        if (
            self.separator == "eos"
            and own == "bos"
            and self._separator != self.tokenizer.bos_token_id
        ):
            log.warning(
                "documents are joined by %s (separator=eos), while the tokenizer begins texts with "
                "%s: a model that has met %s before every text wants separator=bos",
                *(self.tokenizer.eos_token, *[self.tokenizer.bos_token] * 2),
            )
        return super().prepare()

    @functools.cached_property
    def _separator(self) -> int:
        name = f"{self.separator}_token"
        return tokenizers.token_id(self.tokenizer, name, "causal language modelling")

    def _blocks(self, tokens_N, partial):
        return Blocks(tokens_N, self.seq_len, self.seq_len + 1, partial)

    def beginnings(self, split, most):
        """Finds the first tokens of each document, so many with the separator before it; documents
        that have no more of them, and the first one of all, are left out."""
        tokens_N = self._tokens(split)
        ends_D = np.flatnonzero(tokens_N == self._separator)
        long = np.diff(ends_D) > most
        return Beginnings(tokens_N, ends_D[:-1][long], np.full(long.sum(), most, np.int64))

    def _make(self, cut, seed, ids_B, epochs_B):
        text_BW, valid_BW = cut.rows(ids_B)
        text_BW = np.where(valid_BW, text_BW, self._separator)  # padding, with mask and weight 0
        return Batch(
            ids_B=ids_B.astype(np.int32),
            tokens_BT=text_BW[:, :-1],
            mask_BT=valid_BW[:, :-1].astype(np.float32),
            labels=np.where(valid_BW[:, 1:], text_BW[:, 1:], 0),
            weights=valid_BW[:, 1:].astype(np.float32),
        )


make = CausalLM
