"""A part of the config as a plain dict: unknown keys and wrong types are refused, missing keys get
defaults."""

import difflib
from collections.abc import Mapping
from typing import Any

from kd_jax.errors import UserError


def settings(config: Mapping | None, defaults: dict[str, Any], where: str) -> dict[str, Any]:
    """`config` (a dict, a ConfigDict or None) over `defaults`.

    `where` is the config path for messages, such as "data.train". Raises UserError for a key that
    `defaults` lacks, and for a value of another type than its default; None stands for any type.
    """
    if config is None:
        return dict(defaults)
    path = f"config.{where}" if where else "config"
    if not hasattr(config, "items"):
        raise UserError(f"{path}={config!r} must be a dict with {', '.join(defaults)}")
    given = dict(config.items())
    for key, value in given.items():
        if key not in defaults:
            close = difflib.get_close_matches(str(key), defaults, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise UserError(f"unknown key {path}.{key}{hint}; have: {', '.join(defaults)}")
        want = _expected(defaults[key], value)
        if want:
            raise UserError(f"{path}.{key}={value!r} should be {want}")
    return defaults | given


def _expected(default: Any, value: Any) -> str:
    """What `value` should be to stand in the place of `default`; "" where it is that."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if default is None:
        return ""
    if isinstance(default, bool):
        return "" if isinstance(value, bool) else "True or False"
    if isinstance(default, int):
        return "" if number and isinstance(value, int) else "a whole number"
    if isinstance(default, float):
        return "" if number else "a number"
    if isinstance(default, str):
        return "" if isinstance(value, str) else "a string"
    if hasattr(default, "items"):
        return "" if hasattr(value, "items") else "a dict"
    return "" if isinstance(value, list | tuple) else "a list"
