"""Defines the base of all tasks: streams of batches from splits of config.data, and metrics.

A module of kd_jax.tasks is a task when it defines `make(config, data, tokenizer)`, a `Task` of
config.task and config.data, whose tokenizer may be None where no rows are asked for; `DEFAULTS`
are those of config.task.
"""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
from transformers import PreTrainedTokenizerBase

from kd_jax.data import splits
from kd_jax.data.encoded import Encoded
from kd_jax.data.loader import Batches, BucketStream, lengths_of, lengths_of_pass
from kd_jax.models.model_config import ModelConfig
from kd_jax.ranges import settings
from kd_jax.types import Batch


def batch_shapes(
    batch_size: int, seq_len: int, slots: int, label: type = np.int32, **others: int
) -> Batch:
    """Makes a batch of shapes and types (jax.ShapeDtypeStruct) in place of arrays. A row has
    `slots` labels and weights; `others` maps further int32 fields to the sizes of their second
    axes."""

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


def local(train: Path, test: Path | None = None) -> dict[str, Any]:
    """Makes a config.data that reads local files or folders."""
    paths = {"train": train} | ({"test": test} if test else {})
    return {key: dict(source="files", path=str(path)) for key, path in paths.items()}


class Task(splits.Splits):
    """Makes batches of the splits of config.data, and computes metrics; a subclass reads files."""

    head: str  # mlm | clm | classification | span | embedding
    of_examples: bool  # each model reads them with its own tokenizer, and its logits are scored
    labels: tuple[str, ...] = ()  # names of the classes; ("score",) for a regression
    labels_in_data = False  # whether `labels` needs the training data
    regression = False
    primary: str  # the held-out figure that selects a checkpoint
    larger: bool  # whether a larger one is better
    defaults: dict[str, Any]  # of config.task
    data_defaults: dict[str, Any] = splits.DATA  # defaults of config.data
    own_data: dict[str, Any] | None = None  # the source of train and test that are left out

    # What command lines call it: its module's name, or `alias`; with `variants` NAME/VARIANT, which
    # sets config.task.<variant>.
    alias = ""
    variant = ""
    variants: tuple[str, ...] = ()
    unread: dict[str, tuple[str, ...]] = {}  # settings that a variant does not read
    by_likelihood = False
    of_text = False  # whether a source's key `text` names the column
    of_chats = False  # whether the tokenizer's chat template makes the text
    evaluated: dict[str, Any] = {}  # of config.task, where one split is all there is to read

    def __init__(
        self, config: Mapping, data: Mapping | None, tokenizer: PreTrainedTokenizerBase | None
    ) -> None:
        """Checks config.task and config.data; `tokenizer` may be None if no rows are needed."""
        self.config = settings(config, self.defaults, "task")
        super().__init__(settings(data, self.data_defaults, "data"))
        if self.own_data is not None:
            self.data |= {key: self.data[key] or self.own_data for key in ("train", "test")}
        self.tokenizer = tokenizer
        self.seq_len = self.config["seq_len"]

    # What a subclass defines.

    @classmethod
    def smoke(
        cls, task: Mapping, data: Mapping, samples: Path
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns config.task's changes and config.data for `:smoke`, given the experiment's own;
        `samples` is a folder of small made-up data (kd_jax/smoke.py)."""
        raise NotImplementedError

    def with_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> Self:
        """Returns the same task with another tokenizer."""
        raise NotImplementedError

    def shapes(self, batch_size: int) -> Batch:
        """Describes a batch by jax.ShapeDtypeStruct, for compiling before any data is read."""
        raise NotImplementedError

    def _stream(self, split: str, batch_size: int, seed: int | None = None, **processes) -> Batches:
        raise NotImplementedError

    def _about(self, split: str) -> dict[str, Any]:
        """Counts what a split holds: see `prepare`."""
        raise NotImplementedError

    @classmethod
    def settings_of(cls, config: ModelConfig, name: str) -> dict[str, Any]:
        """Reads settings of the task, keys of config.task, off the config of a model that is to be
        evaluated, such as the prompts of an embedder. `name`: the task on command lines."""
        return {}

    def noted_in(self, config: ModelConfig) -> ModelConfig:
        """Adds to the config of a model that is trained on the task how its texts are read, such as
        an embedder's prompts, so that its export says so."""
        return config

    @property
    def labels_only(self) -> dict[str, Any]:
        """Returns the objective of a stage without a teacher. Raises UserError if there is none."""
        return {"mse" if self.regression else "ce": {"weight": 1.0}}

    # What a subclass inherits.

    @property
    def outputs(self) -> str:
        """Names what models give: tokens | classes | regression | vector (`build_objective`)."""
        if self.head == "embedding":
            return "vector"
        if self.regression:
            return "regression"
        return "classes" if self.of_examples else "tokens"

    def train(
        self, batch_size: int, seed: int, process_index: int = 0, process_count: int = 1
    ) -> Batches:
        """Makes an endless, shuffled stream of global batches of `batch_size` training rows."""
        processes = dict(process_index=process_index, process_count=process_count)
        return self._stream("train", batch_size, seed=seed, **processes)

    def held_out(
        self, split: str, batch_size: int, process_index: int = 0, process_count: int = 1
    ) -> Batches:
        """Makes one pass over all rows of a split, always the same."""
        processes = dict(process_index=process_index, process_count=process_count)
        return self._stream(split, batch_size, **processes)

    def prepare(self) -> dict[str, dict]:
        """Reads every split of the config now, and then tokenizes them where there is a tokenizer,
        so that mistakes show before long work.

        Returns for the run's manifest: split -> name, commit, digest, and counts. For examples:
        `examples`, their `classes` (name -> count); once tokenized also `rows`, `longest` (tokens
        of the longest example before cutting) and `cut` (examples longer than a row). For text:
        `documents`, `tokens`, `rows`. For chats: `conversations`, `cut`, `dropped`, `rows`,
        `tokens`, `learnt` (tokens), `longest`.
        """
        read = {split: splits.about(self.examples(split)) for split in self.splits}
        return {split: about | self._about(split) for split, about in read.items()}


class ExampleTask(Task):
    """A task on examples. Subclasses read and tokenize them, and score a model's logits.

    `metrics` are the figures of `score` without the loss; `primary` is the one that selects
    checkpoints, and bigger is better.
    """

    of_examples = larger = True
    metrics: tuple[str, ...]

    def __init__(self, config, data, tokenizer) -> None:
        super().__init__(config, data, tokenizer)
        self._rows: dict[str, Encoded] = {}

    # What a subclass defines, with `_read` and `_held_out`.

    def _encode(self, split: str) -> Encoded:
        raise NotImplementedError

    def has_labels(self, split: str) -> bool:
        """Tells whether a split has labels; a benchmark may keep those of its test set secret."""
        return True

    def score(self, split: str, outputs: Sequence[np.ndarray]) -> dict[str, float]:
        """Computes the loss and the `metrics` from logits: one float array for each row of
        `rows(split)`, in their order, (C,) for classification or regression, (2, T) start and end
        logits for spans, (D,) for embedding."""
        raise NotImplementedError

    def report(self, split: str, outputs: Sequence[np.ndarray]) -> dict:
        """Computes figures class by class, where there are classes."""
        return {}

    def tunes(self, split: str) -> bool:
        """Tells whether metrics of `split` need a number that `tuned` finds on the validation
        split."""
        return False

    def tuned(self, outputs: Sequence[np.ndarray]) -> "ExampleTask":
        """Returns the task with its threshold tuned on a model's logits of the validation split,
        for scoring that model on test; itself if there is nothing to tune."""
        return self

    def predictions(self, split: str, outputs: Sequence[np.ndarray]) -> Any:
        """Converts logits into predictions, as `write_submission` writes them."""
        raise NotImplementedError

    def write_submission(self, split: str, outputs: Sequence[np.ndarray], path: str) -> None:
        """Writes predictions in the format of the data set's authors."""
        raise NotImplementedError

    def read_predictions(self, split: str, path: str) -> Any:
        """Reads predictions from a file in the format of `write_submission`, perhaps from another
        system. Raises UserError for missing, unknown and repeated examples."""
        raise NotImplementedError

    def score_predictions(self, split: str, predictions: Any) -> dict[str, float]:
        """Computes the metrics of predictions, which need no logits."""
        raise NotImplementedError

    # What a subclass inherits.

    @classmethod
    def smoke(cls, task, data, samples):
        """Replaces the data by sentences of two classes; 16 tokens give two bucket lengths."""
        return dict(seq_len=16), local(
            *(samples / "SST-2" / f"{name}.tsv" for name in ("train", "dev"))
        )

    def with_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> Self:
        """Returns the same task with another tokenizer; examples are not read again."""
        other = copy.copy(self)
        other.tokenizer, other._rows = tokenizer, {}
        return other

    def _about(self, split):
        found = dict(examples=len(self.examples(split)))
        if self.tokenizer is not None:
            rows = self.rows(split)
            found |= dict(rows=len(rows), longest=rows.longest, cut=rows.cut)
        return found

    def texts(self, split: str) -> list[str]:
        """Lists all texts of a split, for training a tokenizer."""
        return [text for texts in self.examples(split).pairs for text in texts]

    def rows(self, split: str) -> Encoded:
        """Tokenizes the rows of a split, once."""
        if split not in self._rows:
            self._rows[split] = self._encode(split)
        return self._rows[split]

    @property
    def buckets(self) -> tuple[int, ...]:
        """Lists the lengths of training batches (in tokens), ascending."""
        return lengths_of(self.rows("train").lengths_N, self.seq_len)

    def _stream(self, split, batch_size, seed=None, **processes):
        rows = self.rows(split)
        if seed is None:
            buckets = lengths_of_pass(rows.lengths_N, self.seq_len, batch_size)
        else:
            buckets = self.buckets
        return BucketStream(rows.lengths_N, buckets, rows.batch, batch_size, seed=seed, **processes)

    def shapes(self, batch_size: int, length: int | None = None) -> Batch:
        """Describes a batch by jax.ShapeDtypeStruct, with rows of `length` tokens: by default the
        longest bucket in training, or seq_len without a tokenizer."""
        if length is None:
            length = self.seq_len if self.tokenizer is None else self.buckets[-1]
        typed = self.tokenizer is not None and "token_type_ids" in self.tokenizer.model_input_names
        slots, label = 2 if self.head == "span" else 1, np.float32 if self.regression else np.int32
        types = {"types_BT": length} if typed else {}
        return batch_shapes(batch_size, length, slots, label, **types)
