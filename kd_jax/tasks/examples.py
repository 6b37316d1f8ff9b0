"""What fine-tuning tasks share: splits of examples, tokenised once, as streams of buckets."""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from kd_jax.data.encoded import Encoded
from kd_jax.data.loader import BucketStream, lengths_of
from kd_jax.tasks.language import Task, batch_shapes
from kd_jax.types import Batch


class ExampleTask(Task):
    """A task on examples. Subclasses read and tokenise them, and score what a model returns.

    `metrics` are the figures of `score` beside the loss; `primary` is the one that selects, and
    bigger is better.
    """

    head: str  # "classification" | "span"
    labels: tuple[str, ...]  # names of the classes; ("score",) for a regression, () for spans
    of_examples = larger = True  # see tasks/language.py
    primary: str
    metrics: tuple[str, ...]

    hub: dict[str, Any] | None = None  # the source of train and test that are left out

    def __init__(self, config, data, tokenizer) -> None:
        super().__init__(config, data, tokenizer)
        if self.hub is not None:
            self.data |= {key: self.data[key] or self.hub for key in ("train", "test")}
        self._rows: dict[str, Encoded] = {}

    # What a subclass defines, with `_read` and `_held_out`.

    def _encode(self, split: str) -> Encoded:
        raise NotImplementedError

    def has_labels(self, split: str) -> bool:
        """Whether a split can be scored. Labels of test sets that servers score are secret."""
        return True

    def score(self, split: str, outputs: Sequence[np.ndarray]) -> dict[str, float]:
        """The loss and the `metrics` of a model's outputs: one float array for each row of
        `rows(split)`, in their order; (C,) logits of a classification or regression, (2, T) start
        and end logits of a span."""
        raise NotImplementedError

    def report(self, split: str, outputs: Sequence[np.ndarray]) -> dict:
        """Figures class by class, where there are classes."""
        return {}

    def tunes(self, split: str) -> bool:
        """Whether scoring `split` needs a number that is `tuned` on the validation split."""
        return False

    def predictions(self, split: str, outputs: Sequence[np.ndarray]) -> Any:
        """What the outputs say, in plain words: what `write_submission` writes down."""
        raise NotImplementedError

    def write_submission(self, split: str, outputs: Sequence[np.ndarray], path: str) -> None:
        """Writes predictions in the format of the data set's authors."""
        raise NotImplementedError

    def read_predictions(self, split: str, path: str) -> Any:
        """Predictions from such a file, which may come from another system. Raises UserError for
        missing, unknown and repeated examples."""
        raise NotImplementedError

    def score_predictions(self, split: str, predictions: Any) -> dict[str, float]:
        """The figures that need no logits."""
        raise NotImplementedError

    # What it gets.

    def with_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> "ExampleTask":
        """The same task, its rows written by another tokenizer; examples are read once."""
        other = copy.copy(self)
        other.tokenizer, other._rows = tokenizer, {}
        return other

    def tuned(self, outputs: Sequence[np.ndarray]) -> "ExampleTask":
        """The task with what is chosen by a model's outputs of the validation split, for scoring
        that model on test; itself where nothing is."""
        return self

    def _about(self, split):
        if self.tokenizer is not None:
            self.rows(split)
        return dict(examples=len(self.examples(split)))

    def texts(self, split: str) -> list[str]:
        """All texts of a split, for training a tokenizer."""
        return [text for texts in self.examples(split).pairs for text in texts]

    def rows(self, split: str) -> Encoded:
        """The tokenised rows of a split."""
        if split not in self._rows:
            self._rows[split] = self._encode(split)
        return self._rows[split]

    def length(self, split: str) -> int:
        """Tokens of the longest bucket of a split, which holds all of its rows."""
        return self.buckets_of(split)[-1]

    @property
    def buckets(self) -> tuple[int, ...]:
        """The lengths of batches in training, ascending."""
        return self.buckets_of("train")

    def buckets_of(self, split: str) -> tuple[int, ...]:
        """The lengths of a split's batches, ascending: those in training, so that all splits run
        through the same compiled programs, and one more where a split has longer rows."""
        first = "train" if "train" in self.splits else split
        found = lengths_of(self.rows(first).lengths_N, self.seq_len)
        longest = lengths_of(self.rows(split).lengths_N, self.seq_len)[-1]
        return found if longest <= found[-1] else (*found, longest)

    def _stream(self, split, batch_size, seed=None, **processes):
        rows, buckets = self.rows(split), self.buckets_of(split)
        lengths_N = rows.lengths_N
        return BucketStream(lengths_N, buckets, rows.batch, batch_size, seed=seed, **processes)

    def shapes(self, batch_size: int, length: int | None = None) -> Batch:
        """A batch of jax.ShapeDtypeStruct of rows of `length` tokens: by default the longest
        bucket in training, or seq_len where there is no tokenizer."""
        if length is None:
            length = self.seq_len if self.tokenizer is None else self.buckets[-1]
        typed = self.tokenizer is not None and "token_type_ids" in self.tokenizer.model_input_names
        slots, label = 2 if self.head == "span" else 1, np.float32 if self.regression else np.int32
        types = {"types_BT": length} if typed else {}
        return batch_shapes(batch_size, length, slots, label, **types)
