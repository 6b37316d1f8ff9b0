"""A part of the config as a plain dict: unknown keys, wrong types and numbers outside their range
are refused, missing keys get defaults."""

import difflib
from collections.abc import Mapping
from typing import Any

from kd_jax.errors import UserError
from kd_jax.ranges import UNSET, Real


def settings(config: Mapping | None, defaults: dict[str, Any], where: str) -> dict[str, Any]:
    """`config` (a dict, a ConfigDict or None) over `defaults`.

    `where` is the config path for messages, such as "data.train". A number's default stands in its
    range (kd_jax/ranges.py), of which some have none: such a key is left out where `config` lacks
    it. None stands for any type. Raises UserError for a key that `defaults` lacks, for a value of
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
    own = {
        key: value.default if isinstance(value, Real) else value for key, value in defaults.items()
    }
    return {key: value for key, value in own.items() if value is not UNSET} | given


def _expected(default: Any, value: Any) -> str:
    """What `value` should be to stand in the place of `default`; "" where it is that."""
    if default is None:
        return ""
    if isinstance(default, bool):
        return "" if isinstance(value, bool) else "True or False"
    if isinstance(default, str):
        return "" if isinstance(value, str) else "a string"
    if hasattr(default, "items"):
        return "" if hasattr(value, "items") else "a dict"
    if isinstance(default, list | tuple):
        return "" if isinstance(value, list | tuple) else "a list"
    raise TypeError(f"the default {default!r} has no range")
