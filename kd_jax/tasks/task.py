"""What masked and causal language modelling share: splits of text, cut into blocks, as streams.

config.data:
    train       a source (data/source.py)
    validation  a source for selection (best checkpoint, tuning); None holds documents out of
                train instead
    test        a source for the figures that are reported
    held_out    share of train's documents that is held out where there is no validation
    cache_dir   where tokens are kept (default: $KD_JAX_CACHE, else ~/.cache/kd_jax)
"""

import functools
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import numpy as np
from transformers import PreTrainedTokenizerBase

from kd_jax.data import blocks, cache, source
from kd_jax.data.documents import Documents, hold_out
from kd_jax.data.loader import Stream
from kd_jax.data.settings import settings
from kd_jax.errors import UserError
from kd_jax.ranges import Real
from kd_jax.types import Batch

DATA = dict(
    train=None,
    validation=None,
    test=None,
    held_out=Real(above=0, below=1, default=0.1),
    cache_dir=None,
)

# Not the run's seed: all stages and all seeds of an experiment are selected and reported on the
# same documents with the same masks.
HELD_OUT_SEED = 20181011


def label_a_token(batch_size: int, seq_len: int) -> Batch:
    """A batch of jax.ShapeDtypeStruct with a label and a weight for every token."""
    integers = jax.ShapeDtypeStruct((batch_size, seq_len), np.int32)
    numbers = jax.ShapeDtypeStruct((batch_size, seq_len), np.float32)
    ids_B = jax.ShapeDtypeStruct((batch_size,), np.int32)
    return Batch(ids_B, integers, mask_BT=numbers, labels=integers, weights=numbers)


class Task(Protocol):
    """What a run asks of its task, whatever it is: see `TextTask` and `ExampleTask`."""

    head: str  # mlm | clm | classification | span
    of_examples: bool  # each model reads them with its own tokenizer, and its logits are scored
    labels: tuple[str, ...]  # names of the classes, where there are any
    labels_in_data: bool  # whether `labels` needs the training data
    regression: bool
    primary: str  # the held-out figure that selects a checkpoint
    larger: bool  # whether a larger one is better
    seq_len: int
    data: Mapping[str, Any]  # config.data with its defaults

    def with_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> "Task": ...

    def prepare(self) -> dict[str, dict]: ...

    def train(
        self, batch_size: int, seed: int, process_index: int = 0, process_count: int = 1
    ) -> Any: ...

    def held_out(
        self, split: str, batch_size: int, process_index: int = 0, process_count: int = 1
    ) -> Any: ...

    def shapes(self, batch_size: int) -> Batch: ...


class Text:
    """What all language-modelling tasks are: one tokenizer, a loss a token."""

    of_examples = labels_in_data = regression = larger = False
    labels = ()
    primary = "loss"
    given: tuple[Mapping, Mapping | None]  # config.task and config.data

    def with_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> "Text":
        """The same task with a tokenizer."""
        return type(self)(*self.given, tokenizer)


class TextTask(Text):
    """A language-modelling task. Subclasses give the head, the blocks and the batches."""

    head: str

    def __init__(
        self, data: Mapping | None, tokenizer: PreTrainedTokenizerBase | None, seq_len: int
    ) -> None:
        """`tokenizer` may be None where only `shapes` is asked for."""
        self.data = settings(data, DATA, "data")
        self.tokenizer = tokenizer
        self.seq_len = seq_len
        self._documents = functools.cache(self._read)
        self._tokens = functools.cache(self._tokenize)

    # What a subclass defines.

    def shapes(self, batch_size: int) -> Batch:
        """A batch of jax.ShapeDtypeStruct: what every batch of this task looks like."""
        raise NotImplementedError

    def _separator(self) -> int:
        raise NotImplementedError

    def _blocks(self, tokens_N, partial: bool) -> blocks.Blocks:
        raise NotImplementedError

    def _make(self, cut: blocks.Blocks, seed: int, ids_B, epochs_B) -> Batch:
        raise NotImplementedError

    # What it gets.

    def train(
        self, batch_size: int, seed: int, process_index: int = 0, process_count: int = 1
    ) -> Stream:
        """Endless, shuffled stream of global batches of `batch_size` rows of training text; a last
        block that is not full is left out."""
        cut = self._cut("train", partial=False)
        return Stream(
            len(cut),
            functools.partial(self._make, cut, seed),
            batch_size,
            seed=seed,
            process_index=process_index,
            process_count=process_count,
        )

    def held_out(
        self, split: str, batch_size: int, process_index: int = 0, process_count: int = 1
    ) -> Stream:
        """One pass over all of the text of "validation" or "test", always the same."""
        cut = self._cut(split, partial=True)
        return Stream(
            len(cut),
            functools.partial(self._make, cut, HELD_OUT_SEED),
            batch_size,
            process_index=process_index,
            process_count=process_count,
        )

    def prepare(self) -> dict[str, dict]:
        """Reads and tokenises every split of the config now, so that mistakes show before long
        work. Returns for the run's manifest: split -> name, commit, digest, documents, tokens."""
        manifest = {}
        for split in ("train", "validation", "test"):
            if self.data[split] is None and not (split == "validation" and self.data["train"]):
                continue
            documents = self._documents(split)
            manifest[split] = dict(
                name=documents.name,
                commit=documents.commit,
                digest=documents.identity.digest,
                documents=documents.identity.count,
                tokens=len(self._tokens(split)),
            )
        return manifest

    def _cut(self, split: str, partial: bool) -> blocks.Blocks:
        cut = self._blocks(self._tokens(split), partial)
        if not len(cut):
            raise UserError(
                f"{self._documents(split).name} holds {len(cut.tokens_N)} tokens, too few for a "
                f"block of config.task.seq_len={self.seq_len}: add text or shorten the blocks"
            )
        return cut

    def _read(self, split: str) -> Documents:
        if split not in ("train", "validation", "test"):
            raise UserError(f"unknown split {split!r}; have: train, validation, test")
        from_train = self.data["validation"] is None and split != "test"
        key = "train" if from_train else split
        if self.data[key] is None:
            raise UserError(f"config.data.{key} is not set: give it a source, such as a file")
        if not from_train:
            return source.read(self.data[split], f"data.{split}")
        everything = self._all_of_train
        if everything.identity.count < 2:
            raise UserError(
                "config.data.train holds one document, of which nothing can be held out: set "
                "config.data.validation to a source, or separate documents by blank lines"
            )
        rest, held = hold_out(everything, self.data["held_out"], HELD_OUT_SEED)
        return rest if split == "train" else held

    @functools.cached_property
    def _all_of_train(self) -> Documents:
        return source.read(self.data["train"], "data.train")

    def _tokenize(self, split: str):
        folder = cache.folder(self.data["cache_dir"])
        tokenizer = self.tokenizer.backend_tokenizer
        return blocks.tokenize(self._documents(split), tokenizer, self._separator(), folder)
