"""The experiments that come with kd_jax: configs/NAME.py of a clone, or of an installed package."""

from __future__ import annotations

import ast
import difflib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from ml_collections import ConfigDict

from kd_jax.errors import UserError


def folder() -> Path:
    """Finds the experiments' folder: inside the installed package, else beside it in a clone."""
    inside = Path(__file__).parent / "configs"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "configs"


def names() -> list[str]:
    """Lists the experiments by name."""
    return sorted(path.stem for path in folder().glob("[!_]*.py"))


def title(name: str) -> str:
    """Reads the first sentence of an experiment's docstring, without running the file."""
    docstring = ast.get_docstring(ast.parse((folder() / f"{name}.py").read_text())) or ""
    return docstring.partition("\n\n")[0].replace("\n", " ")


def load(name: str, variant: str | None = None) -> ConfigDict:
    """Reads the config of an experiment, so that another one can start from it."""
    return module(name).get_config(variant)


def module(name: str) -> ModuleType:
    """Imports an experiment's file as the module `configs.NAME`, once."""
    full = f"configs.{name}"
    if full not in sys.modules:
        spec = importlib.util.spec_from_file_location(full, path(name))
        sys.modules[full] = found = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found)
    return sys.modules[full]


def path(given: str) -> str:
    """Finds the file of an experiment.

    Args:
        given: the path of a config file, or the name of an experiment of kd_jax ("quickstart");
            both with a variant behind a colon or without.

    Returns:
        the path, with the variant. Raises UserError where there is neither file nor experiment.
    """
    file, colon, variant = given.partition(":")
    if Path(file).is_file():
        return given
    found = folder() / f"{Path(file).stem}.py"
    if file in (found.stem, f"configs/{found.name}") and found.is_file():
        return f"{found}{colon}{variant}"
    close = difflib.get_close_matches(Path(file).stem, names(), n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(close)}?" if close else f"have: {', '.join(names())}"
    raise UserError(f"--config={given}: no such file, and no experiment of that name; {hint}")


def main() -> None:
    """Prints the experiments, a line each."""
    for name in names():
        print(f"{name:<24} {title(name)}")
    print(f"\nkd-jax main --config=NAME runs one, NAME:smoke a tiny one; files: {folder()}")
