"""English text that every Python has: the language reference and the library's docstrings.

About 2 MB, the same for the same version of Python; for the quickstart and for smoke runs, which
must work without a network. Modules are parsed, not imported.
"""

import ast
import functools
import platform
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from kd_jax.data.documents import Documents

_LEFT_OUT = {"__pycache__", "dist-packages", "encodings", "idlelib", "lib2to3", "pydoc_data"}
_LEFT_OUT |= {"site-packages", "test", "tests", "turtledemo"}
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def documents(spec: dict, where: str) -> Documents:
    """One document a topic of the reference, then one a module of the standard library."""
    return Documents(f"Python {platform.python_version()}'s own text", lambda: iter(_texts()))


@functools.cache
def _texts() -> tuple[str, ...]:
    from pydoc_data.topics import topics

    library = Path(sysconfig.get_path("stdlib"))
    modules = (_docstrings(file) for file in _modules(library))
    return tuple(topics[name] for name in sorted(topics)) + tuple(filter(None, modules))


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
