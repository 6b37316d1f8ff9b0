"""Finds and reads experiments: config files of kd_jax (configs/NAME.py) or of the user."""

from __future__ import annotations

import ast
import difflib
import importlib.util
import sys
import sysconfig
import traceback
from pathlib import Path
from types import ModuleType

from ml_collections import ConfigDict

from kd_jax.errors import UserError, line


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
    """Reads the config of an experiment of kd_jax, so that another one can start from it."""
    return _module(path(name)).get_config(variant)


def read(given: str) -> ConfigDict:
    """Reads the config of an experiment, given its name or the path of a config file (see `path`).

    Raises UserError with the file's line for any mistake in it.
    """
    file, _, variant = path(given).partition(":")
    try:
        found = _module(file).get_config(*([variant] if variant else []))
    except UserError:
        raise
    except Exception as error:
        raise UserError(_place(error)) from error
    if not isinstance(found, ConfigDict) or "recipe" not in found:
        raise UserError(f"{file}: get_config() returns no config; kd_jax/config.py makes them")
    return found.lock()


def _module(file: str) -> ModuleType:
    """Imports a config file; those of kd_jax only once, as `configs.NAME`."""
    own = Path(file).resolve().parent != folder().resolve()
    name = "own_config" if own else f"configs.{Path(file).stem}"
    if own or name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def _place(error: Exception) -> str:
    """Describes an error in a config file on one line, with the last line of the user's code."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}: {error.msg}"
    others = ("<", str(Path(__file__).parent), *map(sysconfig.get_path, ("stdlib", "purelib")))
    frames = traceback.extract_tb(error.__traceback__)
    places = [f"{at.filename}:{at.lineno}: " for at in frames if not at.filename.startswith(others)]
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    return f"{places[-1] if places else ''}{kind}{line(error)}"


def path(given: str) -> str:
    """Finds the file of an experiment.

    Args:
        given: the path of a config file, or the name of an experiment of kd_jax ("quickstart"),
            each optionally with a colon and a variant.

    Returns:
        the path, with the variant. Raises UserError if there is no such file or experiment.
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
    """Prints a line for each experiment of kd_jax."""
    for name in names():
        print(f"{name:<24} {title(name)}")
    print(f"\nkd-jax main --config=NAME runs one, NAME:smoke a tiny one; files: {folder()}")
