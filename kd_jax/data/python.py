"""Reads the English text in every Python: the language reference and the library's docstrings.

About 2 MB (the reference alone, path="reference": 0.5 MB, read at once), the same for the same
version of Python; for the quickstart and for smoke runs, which must work without a network. Modules
are parsed, not imported.
"""

import ast
import functools
import importlib.util
import platform
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from kd_jax.data import identity
from kd_jax.data.source import Documents
from kd_jax.errors import UserError

_LEFT_OUT = {"__pycache__", "dist-packages", "encodings", "idlelib", "lib2to3", "pydoc_data"}
_LEFT_OUT |= {"site-packages", "test", "tests", "turtledemo"}
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def documents(spec: dict, where: str) -> Documents:
    """Opens documents: one for each topic of the reference, then one for each standard module."""
    version = platform.python_version()
    if spec["path"] is None:
        name = f"Python {version}'s own text"
        return Documents(
            name, _all, stamp=lambda: identity.of_files([_topics(), *_modules(_stdlib())])
        )
    if spec["path"] != "reference":
        raise UserError(
            f"config.{where}.path={spec['path']!r}: source 'python' takes 'reference', or no path"
        )
    name = f"the language reference of Python {version}"
    return Documents(name, _reference, stamp=lambda: identity.of_files([_topics()]))


def _all() -> Iterator[str]:
    yield from _reference()
    yield from _library()


def _reference() -> Iterator[str]:
    from pydoc_data.topics import topics

    return (topics[name] for name in sorted(topics))


def _topics() -> str:
    return importlib.util.find_spec("pydoc_data.topics").origin


@functools.cache
def _library() -> tuple[str, ...]:
    return tuple(filter(None, map(_docstrings, _modules(_stdlib()))))


def _stdlib() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _modules(library: Path) -> Iterator[Path]:
    for file in sorted(library.rglob("*.py")):
        folders = file.relative_to(library).parts[:-1]
        if not _LEFT_OUT & set(folders) and not any(name.startswith("config-") for name in folders):
            yield file


def _docstrings(file: Path) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in old modules
        try:
            tree = ast.parse(file.read_bytes())
        except SyntaxError:  # a template or a test's broken module
            return ""
    found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, _DOCUMENTED)]
    return "\n\n".join(filter(None, found))
