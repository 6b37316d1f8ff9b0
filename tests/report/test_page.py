import base64
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest

from kd_jax.recipes.compare import compare
from kd_jax.report import page
from kd_jax.report.table import Table, escaped
from kd_jax.report.tables import CONFUSION
from tests.report import browser, example_run

VOID = {"meta", "link", "img"}


class Outline(HTMLParser):
    """Tags with their attributes, in order; complains of tags that do not close in order."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.texts, self.open = [], [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, name):
        return [attributes for tag, attributes in self.tags if tag == name]


def written(*blocks):
    text = "\n\n".join(b if isinstance(b, str) else b.markdown() for b in blocks)
    return page.write(f"# Title\n\nunder it\n\n## A section\n\n{text}", {}, "student")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The page on three configurations, two of them with two seeds."""
    folder = tmp_path_factory.mktemp("report")
    runs = [
        example_run.write_classifier(folder / f"{weight}-{seed}", seed=seed, weight=weight)
        for weight in (0.1, 0.5, 1.0)
        for seed in range(1 + (weight < 1))
    ]
    compare([*map(str, runs)], str(folder / "out"))
    return folder / "out" / "report.html"


def test_text_is_escaped():
    table = Table("<t>", ["<h>"], [["<c> & 'd'"]])
    found = written(escaped("<p> *a*"), table)
    outline = Outline(found)
    for text in ("<p> *a*", "<t>", "<h>", "<c> & 'd'"):
        assert text in outline.texts
    assert "<c>" not in found and "<p>" in found


def test_sections_are_linked():
    found = written("## More of it")
    assert '<a href="#a-section">A section</a>' in found and '<h2 id="a-section">' in found
    assert '<a href="#more-of-it">More of it</a>' in found and "<title>Title</title>" in found


def test_a_table_names_its_rows_and_columns():
    rows = [["World", "10", "0.1", "0.2 ± 0.1"]]
    table = Table("title", ["", "n", "baseline", "student"], rows, 1, frozenset({(0, 3)}))
    found = written(table)
    outline = Outline(found)
    assert [th.get("scope") for th in outline.all("th")] == ["col"] * 4 + ["row"]
    assert [td.get("class") for td in outline.all("td")] == [None, None, "student"]
    assert outline.all("th")[3]["class"] == "student"
    assert "<strong>0.2 ±\u00a00.1</strong>" in found
    assert [div.get("aria-label") for div in outline.all("div")] == ["title"]


def test_a_confusion_matrix_is_shaded_by_the_share_of_the_row():
    rows = [["a", "3,000", "1,000"], ["b", "0", "0"]]
    outline = Outline(written(Table("m", [CONFUSION, "a", "b"], rows)))
    shades = [td["style"] for td in outline.all("td")]
    assert shades == ["--s:0.750", "--s:0.250", "--s:0.000", "--s:0.000"]


def test_the_report_needs_nothing_from_outside(report):
    outline = Outline(report.read_text())
    for tag, attributes in outline.tags:
        assert tag not in ("script", "iframe", "object")
        for name in ("src", "href", "srcset"):
            assert attributes.get(name, "data:").startswith(("data:", "#"))
    text = report.read_text()
    assert "url(" not in text and "@import" not in text


def test_pictures_are_described_and_follow_the_screen(report):
    images = Outline(report.read_text()).all("img")
    assert len(images) == 4 + 4 + 4  # training, validation, costs, each with its legend
    assert any("student" in image["alt"] and "0.88" in image["alt"] for image in images)
    for image in images:
        svg = base64.b64decode(image["src"].split(",")[1]).decode()
        ElementTree.fromstring(svg)
        assert "#ffffff" not in svg.lower()  # no paper of its own on a dark screen
    assert re.search(r"dark\) \{\s+img \{ filter: invert", report.read_text())


ASKED = """{
  inner: innerWidth,
  scroll: document.documentElement.scrollWidth,
  heading: document.querySelector('h1').innerText,
  tables: document.querySelectorAll('table').length,
  rows: [...document.querySelectorAll('table')].map(t => t.tBodies[0].rows.length),
  students: [...document.querySelectorAll('thead tr:last-child')].map(
      row => [...row.cells].find(cell => cell.innerText == 'student')).filter(x => x).map(
      cell => [cell.getBoundingClientRect().left, cell.getBoundingClientRect().right]),
  frames: [...document.querySelectorAll('.scroll')].map(e => e.getBoundingClientRect().right),
  images: [...document.images].map(i => [i.complete, i.naturalWidth, i.clientWidth]),
}"""


@browser.needs_chromium
@pytest.mark.parametrize("width", [1280, 360])
def test_in_a_browser(report, width):
    found, complaints = browser.ask(report, ASKED, width)
    assert complaints == []
    assert found["inner"] == width
    assert found["scroll"] <= width
    assert max(found["frames"]) <= width
    assert len(found["students"]) == 1 + 3 * 2  # all, and each one's quality and cost
    for left, right in found["students"]:
        assert 0 < left < right <= width
    assert found["heading"] == "3 configurations compared"
    assert found["tables"] == len(Outline(report.read_text()).all("table"))
    assert min(found["rows"]) > 0
    assert len(found["images"]) == 12
    for complete, natural, shown in found["images"]:
        assert complete and natural > 250 and 240 < shown < 450
