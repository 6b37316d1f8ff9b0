"""Reads Hugging Face's config.json: typed values of its keys, and class names."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from kd_jax.errors import UserError
from kd_jax.ranges import Real, Whole

SIZE = Whole(least=1)
RATE = Real(least=0, below=1)  # of dropout
NOT_NEGATIVE = Real(least=0)


class Fields:
    """A reader of a config.json's keys, which checks types and names keys in messages."""

    def __init__(self, hf_json: dict, where: str = "config.json"):
        self.json = hf_json
        self.where = where  # for messages

    def part(self, key: str | None) -> "Fields":
        """Opens the nested object at `key`; an empty one if it is missing or null."""
        found = self.get(key, dict | None, None) if key else None
        return Fields(found or {}, f"{self.where}: {key}" if found else self.where)

    def get(self, key: str, kind: Any, default: Any) -> Any:
        """Reads the value of `key`, which must be a `kind`: a type, a union of types, or a range.
        Null is allowed if it is the default."""
        value = self.json.get(key, default)
        if kind in (float, float | None):
            kind = Real()
        if isinstance(kind, Real):
            kind = dataclasses.replace(kind, default=default)
            value = kind.check(value, f"{self.where}: {key}")
            return value if value is None or isinstance(kind, Whole) else float(value)
        if isinstance(value, kind) and (kind in (bool, bool | None) or not isinstance(value, bool)):
            return value
        name = getattr(kind, "__name__", str(kind))
        raise UserError(f"{self.where}: {key} should be {name}, not {value!r}")

    def only(self, key: str, *supported: Any) -> None:
        """Raises UserError if a key has any but the `supported` values, the first of which is the
        default: such a model is not implemented."""
        value = self.json.get(key, supported[0])
        if value not in supported:
            have = ", ".join(map(repr, supported))
            raise UserError(f"{self.where}: {key}={value!r} is not supported; have: {have}")


def renamed(hf_json: Mapping, names: dict[str, str]) -> dict:
    """Renames keys, old to new. Raises UserError if both names are there with different values."""
    for key, own in names.items():
        if key in hf_json and hf_json.get(own, hf_json[key]) != hf_json[key]:
            raise UserError(f"config.json: {key} and {own} are one, and differ; keep {own}")
    return {names.get(key, key): value for key, value in hf_json.items()}


def read_labels(fields: Fields) -> tuple[str, ...]:
    """Reads the class names in the order of their logits; LABEL_0, LABEL_1 (HF's) by default.

    Raises UserError if classes are not numbered from 0, if two have the same name, or if a row may
    have several.
    """
    fields.only("problem_type", None, "single_label_classification", "regression")
    names = fields.get("id2label", dict | None, None)
    count = fields.get("num_labels", int | None, None)
    if names is None:
        names = {i: f"LABEL_{i}" for i in range(2 if count is None else count)}
    by_id = {str(key): str(name) for key, name in names.items()}
    wanted = [str(i) for i in range(len(by_id) if count is None else count)]
    if not wanted or by_id.keys() != set(wanted):
        have = ", ".join(by_id) or "none"
        raise UserError(
            f"config.json: the keys of id2label should be 0, 1, ... and as many as num_labels, "
            f"where that is given ({count}); have: {have}"
        )
    if fields.json.get("problem_type") == "regression" and len(wanted) > 1:
        raise UserError(
            f"config.json: problem_type='regression' with {len(wanted)} labels is not supported; "
            f"have: one label"
        )
    labels = tuple(by_id[i] for i in wanted)
    for name in labels:
        same = [i for i in wanted if by_id[i] == name]
        if len(same) > 1:
            raise UserError(
                f"config.json: id2label gives classes {' and '.join(same)} one name, {name!r}; "
                f"what is predicted could not be told apart: rename all but one there"
            )
    return labels


def order_in_file(labels: Sequence[str], in_file: Sequence[str]) -> list[int]:
    """Finds the index of each of `labels` among a checkpoint's classes, ignoring case.

    If the checkpoint has the same names in another order (as NLI models do), they are matched;
    otherwise, for instance with LABEL_0, LABEL_1, the orders are assumed to be the same.
    """
    wanted, have = ([name.casefold() for name in names] for names in (labels, in_file))
    if sorted(wanted) != sorted(have) or len(set(have)) < len(have):  # "A" and "a"
        return list(range(len(labels)))
    return [have.index(name) for name in wanted]


def label_keys(hf_json: dict, labels: Sequence[str] | None) -> dict:
    """Writes class names into `hf_json`; removes them if `labels` is None."""
    keys = ("id2label", "label2id", "num_labels", "problem_type")
    kept = {key: value for key, value in hf_json.items() if key not in keys}
    if labels is None:
        return kept
    return kept | {
        "id2label": {str(i): name for i, name in enumerate(labels)},
        "label2id": {name: i for i, name in enumerate(labels)},
        "problem_type": "regression" if len(labels) == 1 else "single_label_classification",
    }
