"""The README's tables are those of results/, and every result says where it comes from."""

import json

import pytest

from benchmarks import results

README = (results.ROOT / "README.md").read_text()
FILES = sorted((results.ROOT / "results").glob("*.json"))


def test_the_readme_shows_what_results_holds():
    assert results.rendered(README) == README, "run: python benchmarks/results.py readme"


def test_every_marked_table_has_its_file():
    named = {name for match in results.MARKED.findall(README) for name in match[2].split()}
    assert named
    assert named <= {path.stem for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_result_is_complete(path):
    entry = json.loads(path.read_text())
    for run in entry.get("runs", []):
        assert run["commit"] and not run["commit"].endswith("+"), "made with uncommitted changes"
        assert run["machine"] and run["versions"] and run["seed"] is not None
    assert entry["command"]
