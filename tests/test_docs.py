"""README and docs/: short enough, links that lead somewhere, and every experiment in its list."""

import re
from pathlib import Path

import pytest

from tests.configs.smokes import NAMES

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)")


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    titles = re.findall(r"(?m)^#+ (.+)$", page.read_text())
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken(page: Path, text: str) -> list[str]:
    """Relative links of a page that name no file, or no heading of one."""
    found = []
    for match in LINK.finditer(text):
        target, anchor = match.groups()
        if target.startswith(("https:", "http:")):
            continue
        path = page if not target else page.parent / target
        if not path.exists() or (anchor and anchor not in anchors(path)):
            found.append(match[0])
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    assert broken(page, page.read_text()) == []


def test_a_broken_link_is_seen():
    page = ROOT / "README.md"
    text = "[a](docs/guide.md) [b](docs/none.md) [c](#install) [d](#nowhere)"
    assert broken(page, text) == ["](docs/none.md)", "](#nowhere)"]


def test_the_readme_is_short_and_lists_every_experiment():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 220
    listed = set(re.findall(r"`(\w+)\.py", text))
    assert [name for name in NAMES if name not in listed] == []
