"""What all tasks share, streams of the splits of config.data; and masked and causal language
modelling, whose splits are text that is cut into blocks.

A module of kd_jax.tasks is a task when it defines `make(config, data, tokenizer)`, a `Task` of
config.task and config.data, whose tokenizer may be None where no rows are asked for; `DEFAULTS`
are those of config.task.

config.data of language modelling as in data/splits.py, with
    cache_dir  where tokens are kept (default: $KD_JAX_CACHE, else ~/.cache/kd_jax)
"""

import functools
from collections.abc import Mapping
from typing import Any, Self

import jax
import numpy as np
from transformers import PreTrainedTokenizerBase

from kd_jax.data import blocks, cache, source, splits
from kd_jax.data.loader import Batches, Stream
from kd_jax.data.source import Documents
from kd_jax.data.splits import HELD_OUT_SEED
from kd_jax.errors import UserError
from kd_jax.ranges import settings
from kd_jax.types import Batch

DATA = splits.DATA | dict(cache_dir=None)


def batch_shapes(
    batch_size: int, seq_len: int, slots: int, label: type = np.int32, **others: int
) -> Batch:
    """A batch of jax.ShapeDtypeStruct with `slots` labels and weights a row; `others` are fields
    of int32, with their second axes."""

    def shape(length: int, dtype: type = np.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch_size, length), dtype)

    return Batch(
        ids_B=jax.ShapeDtypeStruct((batch_size,), np.int32),
        tokens_BT=shape(seq_len),
        mask_BT=shape(seq_len, np.float32),
        labels=shape(slots, label),
        weights=shape(slots, np.float32),
        **{name: shape(length) for name, length in others.items()},
    )


class Task(splits.Splits):
    """A task on the splits of config.data. Subclasses read them, and make batches."""

    head: str  # mlm | clm | classification | span
    of_examples: bool  # each model reads them with its own tokenizer, and its logits are scored
    labels: tuple[str, ...]  # names of the classes, where there are any
    labels_in_data = False  # whether `labels` needs the training data
    regression = False
    primary: str  # the held-out figure that selects a checkpoint
    larger: bool  # whether a larger one is better
    defaults: dict[str, Any]  # of config.task
    data_defaults: dict[str, Any] = splits.DATA  # defaults of config.data

    def __init__(
        self, config: Mapping, data: Mapping | None, tokenizer: PreTrainedTokenizerBase | None
    ) -> None:
        """`tokenizer` may be None where no rows are asked for."""
        self.config = settings(config, self.defaults, "task")
        super().__init__(settings(data, self.data_defaults, "data"))
        self.tokenizer = tokenizer
        self.seq_len = self.config["seq_len"]

    # What a subclass defines.

    def with_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> Self:
        """The same task, its rows written by another tokenizer."""
        raise NotImplementedError

    def shapes(self, batch_size: int) -> Batch:
        """A batch of jax.ShapeDtypeStruct, for compiling before any data is read."""
        raise NotImplementedError

    def _stream(self, split: str, batch_size: int, seed: int | None = None, **processes) -> Batches:
        raise NotImplementedError

    def _about(self, split: str) -> dict[str, Any]:
        """How large a tokenised split is, for the run's manifest."""
        raise NotImplementedError

    # What it gets.

    def train(
        self, batch_size: int, seed: int, process_index: int = 0, process_count: int = 1
    ) -> Batches:
        """Endless, shuffled stream of global batches of `batch_size` training rows."""
        processes = dict(process_index=process_index, process_count=process_count)
        return self._stream("train", batch_size, seed=seed, **processes)

    def held_out(
        self, split: str, batch_size: int, process_index: int = 0, process_count: int = 1
    ) -> Batches:
        """One pass over all rows of a split, always the same."""
        processes = dict(process_index=process_index, process_count=process_count)
        return self._stream(split, batch_size, **processes)

    def prepare(self) -> dict[str, dict]:
        """Reads every split of the config now, and tokenises it where there is a tokenizer, so that
        mistakes show before long work. Returns for the run's manifest: split -> name, commit,
        digest, and how large it is."""
        return {s: splits.about(self.examples(s)) | self._about(s) for s in self.splits}


class Text(Task):
    """What all language-modelling tasks are: one tokenizer, a loss a token."""

    data_defaults = DATA
    of_examples = larger = False
    labels = ()
    primary = "loss"

    def with_tokenizer(self, tokenizer):
        return type(self)(self.config, self.data, tokenizer)


class TextTask(Text):
    """A language-modelling task. Subclasses give the head, the blocks and the batches."""

    too_small = (
        "set config.data.validation to a source, or separate documents by blank lines"  # of a .txt
    )

    def __init__(self, config, data, tokenizer) -> None:
        super().__init__(config, data, tokenizer)
        self._tokens = functools.cache(self._tokenize)

    # What a subclass defines.

    @property
    def _separator(self) -> int:
        """The token between documents."""
        raise NotImplementedError

    def _blocks(self, tokens_N, partial: bool) -> blocks.Blocks:
        raise NotImplementedError

    def _make(self, cut: blocks.Blocks, seed: int, ids_B, epochs_B) -> Batch:
        raise NotImplementedError

    # What it gets.

    def _stream(self, split, batch_size, seed=None, **processes):
        """In training, a last block that is not full is left out."""
        cut = self._blocks(self._tokens(split), partial=seed is None)
        if not len(cut):
            raise UserError(
                f"{self.examples(split).name} holds {len(cut.tokens_N)} tokens, too few for a "
                f"block of config.task.seq_len={self.seq_len}: add text or shorten the blocks"
            )
        make = functools.partial(self._make, cut, HELD_OUT_SEED if seed is None else seed)
        return Stream(len(cut), make, batch_size, seed=seed, **processes)

    def _about(self, split):
        count = self.examples(split).identity.count
        return dict(documents=count, tokens=len(self._tokens(split)))

    def _read(self, key) -> Documents:
        return source.read(self.data[key], f"data.{key}")

    def _held_out(self, whole):
        return splits.random_share(whole.identity.count, self.data["held_out"], HELD_OUT_SEED)

    def _tokenize(self, split: str):
        folder = cache.folder(self.data["cache_dir"])
        tokenizer = self.tokenizer.backend_tokenizer
        return blocks.tokenize(self.examples(split), tokenizer, self._separator, folder)
