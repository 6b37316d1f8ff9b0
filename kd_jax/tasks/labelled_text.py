"""Classification or regression of your own texts, set up in the config alone.

config.task:
    name     "labelled_text"
    text     column of the text
    pair     column of a second text; None where there is none
    label    column of the label
    labels   names of the classes in order; or a dict from labels as the file has them to names,
             whose classes are in the order of the sorted labels; None takes the labels of the
             training data, sorted (whole numbers as numbers), where they are all texts or all whole
             numbers. ("score",) makes it a regression
    primary  the figure that selects: accuracy, macro_f1, or for two classes f1 (of the second) or
             matthews_correlation; of a regression pearson or spearman. None: accuracy, spearman
    seq_len  tokens of a row

config.data as in data/splits.py: .csv, .tsv, .jsonl, .json, .parquet, hub or tfds.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kd_jax.data import source
from kd_jax.errors import UserError
from kd_jax.ranges import Whole
from kd_jax.tasks.classification import ClassificationTask, Texts, class_name, classes, numbers

DEFAULTS = dict(
    name="labelled_text",
    text="text",
    pair=None,
    label="label",
    labels=None,
    primary=None,
    seq_len=Whole(least=8, default=128),
)


class LabelledText(ClassificationTask):
    """Classification or regression of texts, or pairs of texts, in columns named by the config."""

    defaults, alias = DEFAULTS, "text"

    def __init__(self, config, data, tokenizer) -> None:
        super().__init__(config, data, tokenizer)
        self._table = functools.cache(lambda key: source.table(self.data[key], f"data.{key}"))
        given = self.config["labels"]
        if given is not None and (isinstance(given, str) or len(given) == 0):
            raise UserError(f"config.task.labels={given!r} must be a list of names, or a dict")
        self.labels_in_data = given is None
        self.regression = given is not None and tuple(given) == ("score",)
        primary = self.config["primary"]
        if primary is not None and primary not in self.metrics:
            raise UserError(f"config.task.primary={primary!r}; have: {', '.join(self.metrics)}")

    @classmethod
    def smoke(cls, task, data, samples):
        changes, data = super().smoke(task, data, samples)
        return changes | dict(text="sentence"), data

    @functools.cached_property
    def _names(self) -> dict[str, str]:
        """Maps labels, as the file has them, to class names, in the order of the classes."""
        given, key = self.config["labels"], _key("labels")
        if hasattr(given, "items"):
            return {class_name(label, key): str(name) for label, name in _in_order(given)}
        if given is not None:
            return {class_name(name, key): str(name) for name in given}
        if self.data["train"] is None:
            raise UserError("config.data.train is not set: give it a source, or config.task.labels")
        found = self._table("train")
        names = _names_in(found.column(self.config["label"], _key("label")), found.place)
        if len(names) < 2:
            raise UserError(
                f"{found.name}: all labels are {', '.join(names)}; there must be two classes, or "
                f"set config.task.labels"
            )
        return {name: name for name, _ in _in_order(names)}

    @property
    def labels(self) -> tuple[str, ...]:
        return ("score",) if self.regression else tuple(dict.fromkeys(self._names.values()))

    @property
    def metrics(self) -> tuple[str, ...]:
        if self.regression:
            return ("spearman", "pearson")
        two = ("f1", "matthews_correlation") if len(self.labels) == 2 else ()
        return ("accuracy", "macro_f1", *two)

    @property
    def primary(self) -> str:
        return self.config["primary"] or self.metrics[0]

    def _read(self, key):
        found = self._table(key)
        first = found.texts(self.config["text"], _key("text"))
        pair = self.config["pair"]
        second = None if pair is None else found.texts(pair, _key("pair"))
        values = found.column(self.config["label"], _key("label"))
        if self.regression:
            labels_N = numbers(values, found.place)
        else:
            known = {label: self.labels.index(name) for label, name in self._names.items()}
            labels_N = classes(values, known, found.place)
        return Texts(found.name, first, second, labels_N, found.place, found.commit).checked()


def _names_in(values: Sequence, place: Callable[[int], str]) -> dict[str, int]:
    """Finds the class names in a column of labels, each with its first row. UserError if the column
    cannot have been meant as classes."""
    names: dict[str, int] = {}
    for row, value in enumerate(values):
        names.setdefault(class_name(value, place(row)), row)
    alike: dict[str, str] = {}
    first = values[0]
    for name, row in names.items():
        here = f"{place(row)}: the label {values[row]!r}"
        if any(isinstance(values[row], kind) != isinstance(first, kind) for kind in (str, bool)):
            raise UserError(f"{here} is of another kind than {first!r} ({place(0)})")
        if _is_fraction(name):
            raise UserError(
                f"{here} is a real number; set config.task.labels to ('score',) for a regression, "
                f"or to the names of the classes"
            )
        other = alike.setdefault(" ".join(name.casefold().split()), name)
        if other != name:
            raise UserError(
                f"{here} is {other!r} but for white space or capitals; make them one, here or with "
                f"config.task.labels={{{other!r}: {other!r}, {name!r}: {other!r}, ...}}"
            )
    return names


def _is_fraction(name: str) -> bool:
    try:
        return not float(name).is_integer()
    except ValueError:
        return False


def _in_order(mapping: Mapping) -> list[tuple[str, Any]]:
    """Sorts items by key, since a ConfigDict does not keep the order of a dict."""
    items = [(str(key), value) for key, value in mapping.items()]
    whole = all(key.isascii() and key.isdigit() for key, _ in items)
    return sorted(items, key=lambda item: int(item[0]) if whole else item[0])


def _key(name: str) -> str:
    return f"config.task.{name}"


make = LabelledText
