"""Loads plug-ins by module path: `load("objectives", "kl")` is the module kd_jax.objectives.kl."""

import difflib
import importlib
import pkgutil
from types import ModuleType

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
