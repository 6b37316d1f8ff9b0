"""A part of the config as a plain dict: unknown keys are refused, missing ones get defaults."""

import difflib
from collections.abc import Mapping
from typing import Any

from kd_jax.errors import UserError


def settings(config: Mapping | None, defaults: dict[str, Any], where: str) -> dict[str, Any]:
    """`config` (a dict, a ConfigDict or None) over `defaults`.

    `where` is the config path for messages, such as "data.train". Raises UserError for a key that
    `defaults` lacks.
    """
    if config is None:
        return dict(defaults)
    if not hasattr(config, "items"):
        raise UserError(f"config.{where}={config!r} must be a dict with {', '.join(defaults)}")
    given = dict(config.items())
    for key in given:
        if key not in defaults:
            close = difflib.get_close_matches(str(key), defaults, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise UserError(f"unknown key config.{where}.{key}{hint}; have: {', '.join(defaults)}")
    return defaults | given
