"""Reads sections of a config as plain dicts, with defaults for missing keys and errors for unknown
keys, wrong types and numbers outside their range.

A number's range stands in the place of its default: `dict(rate=Real(above=0, default=0.15))`.
"""

import dataclasses
import difflib
import math
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from kd_jax.errors import UserError

UNSET = object()  # the default of a key that the config has to give
_TYPES = (
    (bool, "True or False"),
    (str, "a string"),
    (Mapping | ConfigDict, "a dict"),
    (list | tuple, "a list"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Real:
    """A finite number that float32 holds, between bounds; `least` and `most` are allowed, `above`
    and `below` are not. With a `default` of None the key may be None too."""

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    default: Any = UNSET

    _types = (int, float)
    _kind = "a number"
    _limit = 1e30

    def check(self, value: Any, key: str) -> Any:
        """Checks a value and returns it. Raises UserError naming `key` if it is no such number."""
        if value is None and self.default is None:
            return value
        if isinstance(value, bool) or not isinstance(value, self._types):
            raise UserError(f"{key}={value!r} should be {self._kind}")
        inside = (
            (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )
        if value != value or abs(value) == math.inf:
            raise UserError(f"{key}={value!r} must be finite")
        if not inside:
            raise UserError(f"{key}={value!r} must be {self}")
        if abs(value) > self._limit:
            edge = f"most {self._limit}" if value > 0 else f"least -{self._limit}"
            raise UserError(f"{key}={value!r} must be at {edge}")
        return value

    def __str__(self) -> str:
        bounds = {"at least": self.least, "above": self.above}
        bounds |= {"at most": self.most, "below": self.below}
        return " and ".join(f"{word} {at}" for word, at in bounds.items() if at is not None)


class Whole(Real):
    """A whole number between bounds, like `Real`; by default it fits a signed 32-bit integer."""

    _types = (int,)
    _kind = "a whole number"

    @property
    def _limit(self) -> int:
        return max(2**31 - 1, self.most or 0)


class Choice(Real):
    """One of a list of names, which may include the empty one."""

    def __init__(self, *names: str, default: str | None = None) -> None:
        super().__init__(default=names[0] if default is None else default)
        object.__setattr__(self, "names", names)

    def check(self, value: Any, key: str) -> Any:
        """Checks a value and returns it. Raises UserError naming `key` if it is no listed name."""
        if value not in self.names:
            empty = ", or leave it empty" if "" in self.names else ""
            have = ", ".join(filter(None, self.names))
            raise UserError(f"{key}={value!r}: have {have}{empty}")
        return value

    def __str__(self) -> str:
        return " | ".join(filter(None, self.names))


class Free(Real):
    """A value of any type, which its reader checks."""

    def __init__(self, default: Any) -> None:
        super().__init__(default=default)

    def check(self, value: Any, key: str) -> Any:
        """Accepts any value and returns it."""
        return value


def settings(config: Mapping | None, defaults: dict[str, Any], where: str) -> dict[str, Any]:
    """Reads a section (a dict, a ConfigDict or None) as a dict, with `defaults` for missing keys.

    `where` is the config path for messages, such as "data.train". A number's default is part of its
    range; a range without one makes the key optional: it is missing if `config` lacks it. A default
    of None allows any type. Raises UserError for a key that `defaults` lacks, for a value of
    another type than its default, and for a number outside its range.
    """
    path = f"config.{where}" if where else "config"
    config = {} if config is None else config
    if not hasattr(config, "items"):
        raise UserError(f"{path}={config!r} must be a dict with {', '.join(defaults)}")
    given = dict(config.items())
    for key, value in given.items():
        if key not in defaults:
            close = difflib.get_close_matches(str(key), defaults, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise UserError(f"unknown key {path}.{key}{hint}; have: {', '.join(defaults)}")
        if isinstance(defaults[key], Real):
            defaults[key].check(value, f"{path}.{key}")
        elif want := _expected(defaults[key], value):
            raise UserError(f"{path}.{key}={value!r} should be {want}")
    own = {key: getattr(each, "default", each) for key, each in defaults.items()}
    return {key: value for key, value in own.items() if value is not UNSET} | given


def _expected(default: Any, value: Any) -> str:
    """Names the type of `default` if `value` has a different type, else returns ""."""
    if default is None:
        return ""
    for types, name in _TYPES:
        if isinstance(default, types):
            return "" if isinstance(value, types) else name
    raise TypeError(f"the default {default!r} has no range")
