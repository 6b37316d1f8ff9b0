"""Tables of README and docs/ are those of results/, and every result says where it comes from."""

import ast
import json

import pytest

from benchmarks import results

FILES = sorted((results.ROOT / "results").glob("*.json"))


@pytest.mark.parametrize("page", results.PAGES, ids=lambda page: page.name)
def test_a_page_shows_what_results_holds(page):
    text = page.read_text()
    assert results.rendered(text) == text, "run: python benchmarks/results.py tables"


def test_every_marked_table_has_its_file():
    pages = "".join(page.read_text() for page in results.PAGES)
    named = {name for match in results.MARKED.findall(pages) for name in match[2].split()}
    assert named
    assert named <= {path.stem for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_result_is_complete(path):
    entry = json.loads(path.read_text())
    for run in entry.get("runs", []):
        assert run["commit"] and not run["commit"].endswith("+"), "made with uncommitted changes"
        assert run["machine"] and run["versions"] and run["seed"] is not None
    assert entry["command"]


SCRIPTS = sorted((results.ROOT / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_runs_by_its_path(path):
    """Only its own folder, and what is installed, is found then."""
    tree = ast.parse(path.read_text())
    named = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    named |= {
        name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names
    }
    assert not {name for name in named if name.split(".")[0] in ("benchmarks", "configs", "tests")}
