"""Defines the base of the language-modelling tasks, masked and causal.

config.data as in data/splits.py, with
    cache_dir  where tokens are kept (default: $KD_JAX_CACHE, else ~/.cache/kd_jax)
"""

import functools

import numpy as np

from kd_jax.data import blocks, cache, source, splits
from kd_jax.data.encoded import Beginnings
from kd_jax.data.loader import Stream
from kd_jax.data.source import Documents
from kd_jax.data.splits import HELD_OUT_SEED
from kd_jax.errors import UserError
from kd_jax.tasks.task import Task
from kd_jax.types import Batch

DATA = splits.DATA | dict(cache_dir=None)


class Text(Task):
    """A language-modelling task: all models share one tokenizer, and the loss is per token."""

    data_defaults = DATA
    of_examples = larger = False
    primary = "loss"
    redraws = False  # whether a row is another in every epoch

    def with_tokenizer(self, tokenizer):
        return type(self)(self.config, self.data, tokenizer)

    @property
    def end_of_text(self) -> int:
        """Returns the token with which what a model writes ends: a document, or a turn."""
        raise NotImplementedError

    def beginnings(self, split: str, most: int) -> Beginnings:
        """Finds what a model is to continue in each text of a split, at most `most` tokens; texts
        that have no such beginning are left out. Raises UserError where models write no text."""
        raise UserError(f"config.task.name={self.config['name']!r}: clm and chat have prompts")


class TextTask(Text):
    """Language modelling on text that is cut into blocks. Subclasses define head, blocks and
    batches."""

    of_text = True
    too_small = (
        "set config.data.validation to a source, or separate documents by blank lines"  # of a .txt
    )

    def __init__(self, config, data, tokenizer) -> None:
        super().__init__(config, data, tokenizer)
        self._tokens = functools.cache(self._tokenize)

    @classmethod
    def smoke(cls, task, data, samples):
        train = dict(source="python", path="reference")
        return dict(seq_len=32), dict(train=train, held_out=0.02)

    # What a subclass defines.

    @property
    def _separator(self) -> int:
        """Returns the token between documents."""
        raise NotImplementedError

    def _blocks(self, tokens_N, partial: bool) -> blocks.Blocks:
        raise NotImplementedError

    def _make(self, cut: blocks.Blocks, seed: int, ids_B, epochs_B) -> Batch:
        raise NotImplementedError

    # What it gets.

    @property
    def end_of_text(self):
        return self._separator

    def _cut(self, split: str, training: bool) -> blocks.Blocks:
        """Cuts a split into blocks; in training, an incomplete last block is left out."""
        return self._blocks(self._tokens(split), partial=not training)

    def _stream(self, split, batch_size, seed=None, **processes):
        cut = self._cut(split, training=seed is not None)
        if not len(cut):
            raise UserError(
                f"{self.examples(split).name} holds {len(cut.tokens_N)} tokens, too few for a "
                f"block of config.task.seq_len={self.seq_len}: add text or shorten the blocks"
            )
        make = functools.partial(self._make, cut, HELD_OUT_SEED if seed is None else seed)
        return Stream(len(cut), make, batch_size, seed=seed, **processes)

    def _about(self, split):
        return dict(
            documents=self.examples(split).identity.count,
            tokens=len(self._tokens(split)),
            rows=len(self._cut(split, training=split == "train")),
        )

    def _read(self, key) -> Documents:
        return source.read(self.data[key], f"data.{key}", cache.folder(self.data["cache_dir"]))

    def _held_out(self, whole):
        return splits.random_share(whole.identity.count, self.data["held_out"], HELD_OUT_SEED)

    def _tokenize(self, split: str) -> np.ndarray:
        folder = cache.folder(self.data["cache_dir"])
        tokenizer = self.tokenizer.backend_tokenizer
        return blocks.tokenize(self.examples(split), tokenizer, self._separator, folder)
