"""Defines the base of tasks that predict a class, or a number, for each text or pair of texts."""

import csv
import dataclasses
import functools
import hashlib
import math
import numbers as kinds
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from kd_jax.data import encoded, splits
from kd_jax.data.source import blank
from kd_jax.data.splits import HELD_OUT_SEED
from kd_jax.errors import UserError
from kd_jax.metrics import classification
from kd_jax.tasks.task import ExampleTask


@dataclasses.dataclass(frozen=True)
class Texts:
    """Texts, or pairs of them, and their labels."""

    name: str
    first: list[str]
    second: list[str] | None
    labels_N: np.ndarray | None  # int32 classes, float32 numbers, or None: the labels are secret
    place: Callable[[int], str]  # where row i stands, for messages
    commit: str | None = None

    def checked(self) -> "Texts":
        """Checks that every row has text, and returns itself. UserError names the first that has
        none."""
        for texts in filter(None, (self.first, self.second)):
            for row, text in enumerate(texts):
                if blank(text):
                    raise UserError(f"{self.place(row)}: the text is empty; remove the row")
        return self

    def __len__(self) -> int:
        return len(self.first)

    @property
    def pairs(self) -> list[tuple[str, ...]]:
        return list(zip(*filter(None, (self.first, self.second)), strict=True))

    @functools.cached_property
    def digest(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for texts in self.pairs:
            for text in map(str.encode, texts):
                digest.update(len(text).to_bytes(8, "little"))
                digest.update(text)
        if self.labels_N is not None:
            digest.update(self.labels_N.tobytes())
        return digest.hexdigest()

    def part(self, chosen_N: np.ndarray, name: str) -> "Texts":
        rows = np.flatnonzero(chosen_N).tolist()
        return Texts(
            name,
            [self.first[row] for row in rows],
            None if self.second is None else [self.second[row] for row in rows],
            None if self.labels_N is None else self.labels_N[rows],
            lambda row: self.place(rows[row]),
            self.commit,
        )


def shipped_file(spec: dict, where: str, split: str, *suffixes: str) -> Path | None:
    """Finds a source's file in the original layout of its data set: a file with one of `suffixes`,
    or, in a folder, the file named `split` with the first of them. None for a source that is read
    as a table. UserError if there is no such file."""
    if spec["source"] != "files" or not isinstance(spec["path"], str | Path) or spec["delimiter"]:
        return None
    path = Path(os.path.expanduser(spec["path"]))
    path = path / f"{spec['split'] or split}{suffixes[0]}" if path.is_dir() else path
    if path.suffix not in suffixes:
        return None
    if not path.is_file():
        names = sorted(file.name for file in path.parent.glob(f"*{path.suffix}"))
        have = f"{path.parent} has {', '.join(names) or f'no {path.suffix}'}"
        raise UserError(f"{path} (config.{where}) does not exist: {have}")
    return path


def class_name(value: object, place: str) -> str:
    """Converts a label to the name of its class: 1, 1.0 and "1.0" (as pandas writes whole numbers
    in a column with gaps) all become "1". UserError for a label that is missing, or not a single
    text or number."""
    if value is None or value != value or (isinstance(value, str) and blank(value)):
        shown = "null" if value is None else repr(value)
        raise UserError(f"{place}: the label is missing ({shown}); give the row one or remove it")
    if not isinstance(value, str | kinds.Number):
        raise UserError(
            f"{place}: the label is a {type(value).__name__}, {value!r:.60}; a row has one class, "
            f"a text or a number"
        )
    whole = re.fullmatch(r"([+-]?\d+)\.0+", str(value))
    return whole[1] if whole else str(value)


def classes(values: Sequence, known: Mapping[str, int], place: Callable[[int], str]) -> np.ndarray:
    """Converts the labels of a file into int32 classes; `known` maps names, as `class_name` returns
    them, to classes. UserError names the first label that is missing, unknown, or not a single text
    or number."""
    found = np.empty(len(values), np.int32)
    for row, value in enumerate(values):
        name = class_name(value, place(row))
        if name not in known:
            raise UserError(f"{place(row)}: {value!r} is no label; have: {', '.join(known)}")
        found[row] = known[name]
    return found


def numbers(
    values: Sequence, place: Callable[[int], str], least: float = -math.inf, most: float = math.inf
) -> np.ndarray:
    """Converts the labels of a regression to float32. UserError names the first that is not a
    number, or lies outside [least, most]."""
    found = np.empty(len(values), np.float32)
    for row, value in enumerate(values):
        try:
            found[row] = float(value)
        except (TypeError, ValueError):
            found[row] = math.nan
        if not (math.isfinite(found[row]) and least <= found[row] <= most):
            within = f" between {least:g} and {most:g}" if least > -math.inf else ""
            raise UserError(f"{place(row)}: label {value!r} is no number{within}")
    return found


class ClassificationTask(ExampleTask):
    """A classification or regression; rows have one label each, (B, 1). Subclasses set `labels`,
    `metrics` and `primary`, and read `Texts`; `written` are the classes' names in files of
    predictions."""

    head = "classification"

    @property
    def written(self) -> tuple[str, ...]:
        return self.labels

    def _held_out(self, examples):
        labels_N = examples.labels_N
        if self.regression:
            labels_N = np.zeros(len(examples), np.int32)
        # A text that occurs twice must not be on both sides.
        return splits.stratified(examples.pairs, labels_N, self.data["held_out"], HELD_OUT_SEED)

    def _encode(self, split):
        examples = self.examples(split)
        labels_N = examples.labels_N
        if labels_N is None and split != "test":
            raise UserError(f"{examples.name} (config.data.{split}) has no labels")
        if labels_N is None:
            labels_N = np.zeros(len(examples), np.float32 if self.regression else np.int32)
        return encoded.encode(
            self.tokenizer, examples.first, examples.second, labels_N[:, None], self.seq_len
        )

    def _about(self, split):
        labels_N, found = self.examples(split).labels_N, super()._about(split)
        if labels_N is None or self.regression:
            return found
        counts = np.bincount(labels_N, minlength=len(self.labels)).tolist()
        return found | dict(classes=dict(zip(self.labels, counts, strict=True)))

    def has_labels(self, split):
        return self.examples(split).labels_N is not None

    def score(self, split, outputs):
        logits_NC = self._logits(split, outputs)
        labels_N = self._labels(split)
        if self.regression:
            return classification.regression(logits_NC[:, 0], labels_N)
        loss = classification.cross_entropy(logits_NC, labels_N)
        return {"loss": loss} | self._figures(logits_NC.argmax(axis=1), labels_N)

    def report(self, split, outputs):
        """Computes metrics for each class: {"classes": {name: precision, recall, f1, support},
        "confusion": (C, C) counts}; {} for a regression."""
        if self.regression:
            return {}
        predictions_N = self._logits(split, outputs).argmax(axis=1)
        return classification.by_class(predictions_N, self._labels(split), self.labels)

    def predictions(self, split, outputs) -> list:
        """Returns the predicted class name, or number, of each example."""
        logits_NC = self._logits(split, outputs)
        if self.regression:
            return logits_NC[:, 0].tolist()
        return [self.labels[index] for index in logits_NC.argmax(axis=1)]

    def write_submission(self, split, outputs, path) -> None:
        """Writes a .tsv with a header, `index` (from 0) and `prediction`."""
        lines = ["index\tprediction"]
        for index, prediction in enumerate(self.predictions(split, outputs)):
            if self.regression:
                text = f"{prediction:.6f}"
            else:
                text = self.written[self.labels.index(prediction)]
            lines.append(f"{index}\t{text}")
        Path(path).write_text("\n".join(lines) + "\n")

    def read_predictions(self, split, path) -> list:
        count = len(self.examples(split))
        found: list = [None] * count
        try:
            text = Path(path).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} cannot be read: {error}") from None
        rows = csv.reader(text.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE)
        if next(rows, None) != ["index", "prediction"]:
            raise UserError(f"{path}, row 1: the header must be index TAB prediction")
        for number, row in enumerate(rows, 2):
            place = f"{path}, row {number}"
            if len(row) != 2:
                raise UserError(f"{place}: {len(row)} fields, there must be 2")
            index = int(row[0]) if row[0].isascii() and row[0].isdigit() else -1
            if not 0 <= index < count:
                raise UserError(f"{place}: index {row[0]!r}; have: 0 to {count - 1}")
            if found[index] is not None:
                raise UserError(f"{place}: index {index} is there twice")
            found[index] = self._prediction(row[1], place)
        if None in found:
            missing = found.index(None)
            raise UserError(f"{path} lacks {found.count(None)} of {count} rows: index {missing}")
        return found

    def _prediction(self, text, place):
        if self.regression:
            return float(numbers([text], lambda row: place)[0])
        known = {name: row for row, name in enumerate(self.written)}
        return self.labels[classes([text], known, lambda row: place)[0]]

    def score_predictions(self, split, predictions):
        labels_N = self._labels(split)
        if self.regression:
            return classification.regression(np.array(predictions), labels_N)
        index_N = np.array([self.labels.index(name) for name in predictions])
        return self._figures(index_N, labels_N)

    def _figures(self, predictions_N, labels_N):
        return classification.figures(predictions_N, labels_N, self.metrics, len(self.labels))

    def _labels(self, split):
        examples = self.examples(split)
        if examples.labels_N is None:
            raise UserError(
                f"{examples.name} (config.data.{split}) has no labels, so nothing can be scored"
            )
        return examples.labels_N

    def _logits(self, split, outputs):
        if len(outputs) != len(self.examples(split)):
            raise ValueError(f"{len(outputs)} outputs of {len(self.examples(split))} rows")
        return np.stack([np.asarray(output, np.float32) for output in outputs])
