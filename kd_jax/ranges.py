"""Ranges of the config's numbers, each stated once beside its key, and checked where it is read.

A range stands in the place of a default: `dict(rate=Real(above=0, below=1, default=0.15))`.
"""

import dataclasses
import math
from typing import Any

from kd_jax.errors import UserError

UNSET = object()  # the default of a key that the config has to give


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
        """Returns `value`. Raises UserError naming `key` where it is no such number."""
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
    """A whole number, likewise; without `most` it fits 32 bits with a sign."""

    _types = (int,)
    _kind = "a whole number"

    @property
    def _limit(self) -> int:
        return max(2**31 - 1, self.most or 0)
