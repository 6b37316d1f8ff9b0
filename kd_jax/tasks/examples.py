"""What fine-tuning tasks share: splits of examples, tokenised once, as streams of buckets.

config.data:
    train       a source (data/source.py; tasks add the layouts in which their data is shipped)
    validation  a source for selection (best checkpoint, tuning); None holds examples out of train
                instead, with the seed of tasks/task.py, the same for all runs
    test        a source for the figures that are reported; it selects nothing
    held_out    share of train that is held out where there is no validation
"""

import copy
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import numpy as np
from transformers import PreTrainedTokenizerBase

from kd_jax.data.buckets import BucketStream, lengths_of
from kd_jax.data.encoded import Encoded
from kd_jax.errors import UserError
from kd_jax.ranges import Real
from kd_jax.types import Batch

SPLITS = ("train", "validation", "test")
DATA = dict(train=None, validation=None, test=None, held_out=Real(above=0, below=1, default=0.1))


class Examples(Protocol):
    """The examples of one split, before any tokenizer."""

    name: str
    commit: str | None  # of a hub repository

    def __len__(self) -> int: ...

    @property
    def digest(self) -> str:
        """A hash of all texts and labels."""

    def part(self, chosen_N: np.ndarray, name: str) -> "Examples":
        """Those where the bool array is True."""


class ExampleTask:
    """A task on examples. Subclasses read and tokenise them, and score what a model returns.

    `metrics` are the figures of `score` beside the loss; `primary` is the one that selects, and
    bigger is better.
    """

    head: str  # "classification" | "span"
    labels: tuple[str, ...]  # names of the classes; ("score",) for a regression, () for spans
    regression = False
    labels_in_data = False  # whether `labels` needs the training data
    of_examples = larger = True  # see tasks/task.py
    primary: str
    metrics: tuple[str, ...]

    def __init__(
        self, data: dict[str, Any], tokenizer: PreTrainedTokenizerBase | None, seq_len: int
    ) -> None:
        """`data` are complete settings. `tokenizer` may be None where no rows are asked for."""
        self.data = data
        self.tokenizer = tokenizer
        self.seq_len = seq_len
        self._examples: dict[str, Examples] = {}
        self._rows: dict[str, Encoded] = {}

    # What a subclass defines.

    def _read(self, key: str) -> Examples:
        """All examples of the source config.data.<key>, which is not None."""
        raise NotImplementedError

    def _held_out(self, examples: Examples) -> np.ndarray:
        """bool (N,): the examples of train that are held out for validation."""
        raise NotImplementedError

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

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that the config gives."""
        given = {split for split in SPLITS if self.data[split] is not None}
        return tuple(s for s in SPLITS if s in given or (s == "validation" and "train" in given))

    def with_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> "ExampleTask":
        """The same task, its rows written by another tokenizer; examples are read once."""
        other = copy.copy(self)
        other.tokenizer, other._rows = tokenizer, {}
        return other

    def tuned(self, outputs: Sequence[np.ndarray]) -> "ExampleTask":
        """The task with what is chosen by a model's outputs of the validation split, for scoring
        that model on test; itself where nothing is."""
        return self

    def prepare(self) -> dict[str, dict]:
        """Reads every split of the config now, and tokenises it where there is a tokenizer, so
        that mistakes show before long work. Returns for the run's manifest: split -> name,
        commit, digest, examples."""
        manifest = {}
        for split in self.splits:
            examples = self.examples(split)
            if self.tokenizer is not None:
                self.rows(split)
            manifest[split] = dict(
                name=examples.name,
                commit=examples.commit,
                digest=examples.digest,
                examples=len(examples),
            )
        return manifest

    def examples(self, split: str) -> Examples:
        """The examples of "train", "validation" or "test"."""
        if split not in SPLITS:
            raise UserError(f"unknown split {split!r}; have: {', '.join(SPLITS)}")
        if self.data["validation"] is not None or split == "test":
            return self._whole(split)
        if split not in self._examples:
            whole, share = self._whole("train"), self.data["held_out"]
            held_N = self._held_out(whole)
            if not held_N.any() or held_N.all():
                raise UserError(
                    f"{whole.name} (config.data.train) is too small to hold anything out: set "
                    f"config.data.validation to a source"
                )
            rest = whole.part(~held_N, f"{whole.name} without {share:.0%} held out")
            held = whole.part(held_N, f"{share:.0%} of {whole.name}")
            self._examples |= {"train": rest, "validation": held}
        return self._examples[split]

    def texts(self, split: str) -> list[str]:
        """All texts of a split, for training a tokenizer."""
        return [text for texts in self.examples(split).pairs for text in texts]

    def _whole(self, key: str) -> Examples:
        name = f"all of {key}"
        if name not in self._examples:
            if self.data[key] is None and key not in self.splits:
                raise UserError(f"config.data.{key} is not set: give it a source, such as a file")
            self._examples[name] = self._read(key)
        return self._examples[name]

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

    def train(
        self, batch_size: int, seed: int, process_index: int = 0, process_count: int = 1
    ) -> BucketStream:
        """Endless, shuffled stream of global batches of `batch_size` training rows."""
        return self._stream("train", batch_size, seed, process_index, process_count)

    def held_out(
        self, split: str, batch_size: int, process_index: int = 0, process_count: int = 1
    ) -> BucketStream:
        """One pass over all rows of a split, always the same."""
        return self._stream(split, batch_size, None, process_index, process_count)

    def _stream(self, split, batch_size, seed, process_index, process_count):
        rows = self.rows(split)
        return BucketStream(
            rows.lengths_N,
            self.buckets_of(split),
            rows.batch,
            batch_size,
            seed=seed,
            process_index=process_index,
            process_count=process_count,
        )

    def shapes(self, batch_size: int, length: int | None = None) -> Batch:
        """A batch of jax.ShapeDtypeStruct of rows of `length` tokens: by default the longest
        bucket in training, or seq_len where there is no tokenizer."""
        if length is None:
            length = self.seq_len if self.tokenizer is None else self.buckets[-1]
        typed = self.tokenizer is not None and "token_type_ids" in self.tokenizer.model_input_names
        rows, answers = (batch_size, length), (batch_size, 2 if self.head == "span" else 1)
        label = np.float32 if self.regression else np.int32
        return Batch(
            ids_B=jax.ShapeDtypeStruct((batch_size,), np.int32),
            tokens_BT=jax.ShapeDtypeStruct(rows, np.int32),
            mask_BT=jax.ShapeDtypeStruct(rows, np.float32),
            labels=jax.ShapeDtypeStruct(answers, label),
            weights=jax.ShapeDtypeStruct(answers, np.float32),
            types_BT=jax.ShapeDtypeStruct(rows, np.int32) if typed else None,
        )
