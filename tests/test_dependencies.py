"""What is imported is declared, and what is declared was tested."""

import ast
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DEPENDENCIES = [Requirement(each) for each in PROJECT["dependencies"]]
EXTRAS = {
    name: [Requirement(each) for each in given]
    for name, given in PROJECT["optional-dependencies"].items()
}


def imported(nodes) -> set[str]:
    """Top-level names of packages."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.partition(".")[0])
    return found - sys.stdlib_module_names - {"kd_jax"}


def names(requirements) -> set[str]:
    return {canonicalize_name(each.name) for each in requirements}


def test_imports_are_declared():
    declared = names(DEPENDENCIES)
    optional = declared | names(each for given in EXTRAS.values() for each in given)
    of_module = importlib.metadata.packages_distributions()
    for path in (ROOT / "kd_jax").rglob("*.py"):
        if path.parent.name == "pytorch":  # for PyTorch's users
            continue
        tree = ast.parse(path.read_text())
        for allowed, nodes in ((declared, tree.body), (optional, ast.walk(tree))):
            for module in imported(nodes):
                offered = {canonicalize_name(each) for each in of_module.get(module, [module])}
                assert offered & allowed, f"{path} imports {module}, which is not declared"


def test_pyarrow_comes_late():
    """Its threads, begun before `cli.keep_memory` is called, take arenas that glibc keeps beside
    the one heap: steps would fault in their memory again and again."""
    files = list((ROOT / "kd_jax").rglob("*.py"))
    early = [path for path in files if "pyarrow" in imported(ast.parse(path.read_text()).body)]
    assert files and not early


@pytest.mark.parametrize("requirement", DEPENDENCIES + EXTRAS["test"], ids=str)
def test_versions_are_tested_ones(requirement):
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    pinned = {canonicalize_name(name): version for name, version in pinned.items()}
    assert any(part.operator == "<" for part in requirement.specifier)
    assert pinned[canonicalize_name(requirement.name)] in requirement.specifier


def test_constraints_are_of_any_machine():
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        assert line.startswith("#") or re.fullmatch(r"[\w.-]+==[\w.]+", line), line


@pytest.mark.parametrize("file", ["README.md", "CONTRIBUTING.md", ".ci/run"])
def test_commands_install_them(file):
    commands = re.findall(r"pip install.* -e .*", (ROOT / file).read_text())
    assert commands and all("-c constraints.txt" in command for command in commands)
