"""Reads the splits of config.data, and chooses the held-out rows by data, share and seed alone.

config.data:
    train       a source (data/source.py; tasks add the layouts in which their data is shipped)
    validation  a source for selection (best checkpoint, tuning); None holds a share of train out
                instead
    test        a source for the figures that are reported; it selects nothing
    held_out    share of train that is held out where there is no validation
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Protocol, Self

import numpy as np

from kd_jax.data import source
from kd_jax.errors import UserError
from kd_jax.ranges import Real, settings

SPLITS = ("train", "validation", "test")
DATA = dict(train=None, validation=None, test=None, held_out=Real(above=0, below=1, default=0.1))

# Not the run's seed: all stages and all seeds of an experiment are selected and reported on the
# same rows, with the same masks.
HELD_OUT_SEED = 20181011


class Section(Protocol):
    """The contents of a source, or a selection of them, not yet tokenized."""

    name: str
    commit: str | None  # of a hub repository

    @property
    def digest(self) -> str:
        """Computes a hash of all texts and labels."""

    def part(self, chosen_N: np.ndarray, name: str) -> "Section":
        """Selects the examples at which the bool array `chosen_N` is True."""


@dataclasses.dataclass(frozen=True)
class Questions:
    """Questions of a data source; each is a named tuple of JSON values."""

    name: str  # for messages and the run's manifest
    questions: list[Any]
    place: Callable[[int], str] = str  # where a question stands, for messages: "val.json, row 7"
    commit: str | None = None  # of a hub repository

    def __len__(self) -> int:
        return len(self.questions)

    @functools.cached_property
    def digest(self) -> str:
        """Computes a hash of all texts and answers."""
        digest = hashlib.blake2b(digest_size=16)
        for question in self.questions:
            digest.update(json.dumps(question).encode())
        return digest.hexdigest()

    def part(self, chosen_N: np.ndarray, name: str) -> Self:
        """Selects the examples at which the bool array `chosen_N` is True."""
        rows = np.flatnonzero(chosen_N).tolist()
        chosen = [self.questions[row] for row in rows]
        place = self.place
        return dataclasses.replace(
            self, name=name, questions=chosen, place=lambda row: place(rows[row])
        )


def about(section: Section) -> dict[str, Any]:
    """Describes a section in a run's manifest."""
    return dict(name=section.name, commit=section.commit, digest=section.digest)


class Splits:
    """The splits of config.data, each read once. Subclasses read sources, and choose what is held
    out of train where there is no validation."""

    too_small = "set config.data.validation to a source"  # advice, where nothing can be held out

    def __init__(self, data: Mapping[str, Any]) -> None:
        """Takes config.data, complete with its defaults."""
        self.data = data
        self._sections: dict[str, Any] = {}

    def _read(self, key: str) -> Any:
        """Reads the source config.data.<key>, which is not None, as a `Section`."""
        raise NotImplementedError

    def _spec(self, key: str, **more: Any) -> tuple[str, dict[str, Any]]:
        """Completes the settings of a source: returns (its path in the config, its settings)."""
        where = f"data.{key}"
        return where, settings(self.data[key], source.OF_TABLES | more, where)

    def _held_out(self, whole: Any) -> np.ndarray:
        """Chooses the rows of train that are held out for validation: bool (N,)."""
        raise NotImplementedError

    @property
    def splits(self) -> tuple[str, ...]:
        """Lists the splits that the config gives."""
        given = {split for split in SPLITS if self.data[split] is not None}
        return tuple(s for s in SPLITS if s in given or (s == "validation" and "train" in given))

    def examples(self, split: str) -> Any:
        """Reads the split "train", "validation" or "test"."""
        if split not in SPLITS:
            raise UserError(f"unknown split {split!r}; have: {', '.join(SPLITS)}")
        if self.data["validation"] is not None or split == "test":
            return self._whole(split)
        if split not in self._sections:
            whole, share = self._whole("train"), self.data["held_out"]
            held_N = self._held_out(whole)
            if not held_N.any() or held_N.all():
                raise UserError(
                    f"{whole.name} (config.data.train) is too small to hold anything out: "
                    f"{self.too_small}"
                )
            rest = whole.part(~held_N, f"{whole.name} without {share:.0%} held out")
            held = whole.part(held_N, f"{share:.0%} of {whole.name}")
            self._sections |= {"train": rest, "validation": held}
        return self._sections[split]

    def _whole(self, key: str) -> Any:
        name = f"all of {key}"
        if name not in self._sections:
            if self.data[key] is None and key not in self.splits:
                raise UserError(f"config.data.{key} is not set: give it a source, such as a file")
            self._sections[name] = self._read(key)
        return self._sections[name]


def random_share(count: int, share: float, seed: int) -> np.ndarray:
    """Chooses a random share of rows, at least one and never all: bool (count,)."""
    chosen_N = np.zeros(count, bool)
    order_N = np.random.Generator(np.random.Philox(seed)).permutation(count)
    chosen_N[order_N[: min(max(1, round(share * count)), count - 1)]] = True
    return chosen_N


def stratified(
    groups: Sequence[Hashable], labels_N: np.ndarray, share: float, seed: int
) -> np.ndarray:
    """Chooses about `share` of the rows of each class, at least one row in all: bool (N,).

    Rows of one group (the same text, for instance) stay together; a group counts as one row of its
    first row's class. Nothing is chosen if there is only one group.
    """
    _, first_G, group_N = np.unique(_numbers(groups), return_index=True, return_inverse=True)
    _, class_G = np.unique(np.asarray(labels_N)[first_G], return_inverse=True)
    count = len(first_G)
    random = np.random.Generator(np.random.Philox(seed))
    order_G = random.permutation(count)
    # Every class's rows get evenly spaced places in [0, 1); the first `share` of all is taken.
    place_G = np.empty(count)
    for label in range(class_G.max() + 1):
        rows = order_G[class_G[order_G] == label]
        place_G[rows] = (np.arange(len(rows)) + random.random()) / len(rows)
    chosen_G = np.zeros(count, bool)
    size = min(max(1, round(share * count)), count - 1)
    chosen_G[np.argsort(place_G, kind="stable")[:size]] = True
    return chosen_G[group_N]


def grouped(groups: Sequence[Hashable], share: float, seed: int) -> np.ndarray:
    """Chooses whole groups of rows at random until they hold at least `share` of the rows: bool
    (N,). One group is never chosen, so nothing is if there is only one."""
    group_N = _numbers(groups)
    sizes_G = np.bincount(group_N)
    order_G = np.random.Generator(np.random.Philox(seed)).permutation(len(sizes_G))
    before_G = np.cumsum(sizes_G[order_G]) - sizes_G[order_G]
    chosen_G = order_G[before_G < share * len(group_N)][: len(sizes_G) - 1]
    return np.isin(group_N, chosen_G)


def _numbers(groups) -> np.ndarray:
    """Numbers groups in the order in which they appear."""
    numbers: dict = {}
    return np.array([numbers.setdefault(group, len(numbers)) for group in groups])
