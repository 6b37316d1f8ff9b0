"""Loads plug-ins by module path: `load("objectives", "kl")` is the module kd_jax.objectives.kl; and
other packages without what they need for other users alone."""

import contextlib
import difflib
import importlib
import importlib.util
import pkgutil
import re
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from kd_jax.errors import UserError


def names(kind: str, attribute: str) -> list[str]:
    """Lists the plug-ins of a kind: the modules of kd_jax.<kind> that define `attribute`."""
    package = importlib.import_module(f"kd_jax.{kind}")
    found = [*getattr(package, "ALIASES", ())]
    for module in pkgutil.iter_modules(package.__path__):
        if hasattr(importlib.import_module(f"kd_jax.{kind}.{module.name}"), attribute):
            found.append(module.name)
    return sorted(found)


def load(kind: str, name: str, attribute: str) -> ModuleType:
    """Imports the plug-in kd_jax.<kind>.<name>, which must define `attribute` (`make`, `run`, ...).

    Raises UserError listing all plug-ins of the kind if there is no such one.
    """
    aliases = getattr(importlib.import_module(f"kd_jax.{kind}"), "ALIASES", {})
    path = f"kd_jax.{kind}.{aliases.get(name, name)}"
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name != path:  # the plug-in is there, but something it imports is not
            raise
        module = None
    if module is None or not hasattr(module, attribute):
        have = names(kind, attribute)
        close = difflib.get_close_matches(name, have, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise UserError(f"unknown {kind} plug-in {name!r}{hint}; have: {', '.join(have)}")
    return module


@contextlib.contextmanager
def without_torch() -> Iterator[None]:
    """Keeps packages from importing PyTorch in the block, which takes a second.

    Of all that transformers wants it for, a tokenizer needs the names of types in config.json at
    most; tensorboardX asks only whether it is there. Whatever else is asked of the module that
    stands in for PyTorch, also later, is the real one's.
    """
    spec = None if "torch" in sys.modules else importlib.util.find_spec("torch")
    if spec is None:
        yield
        return
    stand_in = ModuleType("torch")

    def attribute(name: str) -> Any:
        if sys.modules.get("torch") is stand_in:
            if re.fullmatch(r"b?float\d+\w*", name):
                return name
            del sys.modules["torch"]
        return getattr(importlib.import_module("torch"), name)

    stand_in.__spec__, stand_in.__getattr__ = spec, attribute
    sys.modules["torch"] = stand_in
    try:
        yield
    finally:
        if sys.modules.get("torch") is stand_in:
            del sys.modules["torch"]
