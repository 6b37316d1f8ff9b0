import base64
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest

from kd_jax.recipes.compare import compare
from kd_jax.report import plots
from kd_jax.report.page import Details, Document, Finding, Matrices, Matrix, Section
from kd_jax.report.table import Table
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


def page(*blocks):
    return Document("Title", "under it", [Section("A section", [*blocks])]).html()


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
    found = page("<p>", Finding("open", "<lead>", "<f>"), table, Details(table))
    outline = Outline(found)
    for text in ("<p>", "<lead>", "<t>", "<h>", "<c> & 'd'"):
        assert text in outline.texts
    assert "<c>" not in found


def test_sections_without_blocks_are_left_out():
    found = Document("T", "", [Section("Empty", []), Section("Full", ["x"])]).html()
    assert "Empty" not in found and '<a href="#full">Full</a>' in found


def test_a_table_names_its_rows_and_columns():
    spans = (("", 1), ("F1", 2))
    rows = [["World", "10", "0.1", "0.2"]]
    table = Table("title", ["", "n", "a", "b"], rows, 1, frozenset({(0, 3)}), spans)
    outline = Outline(page(table))
    assert [th.get("scope") for th in outline.all("th")] == ["colgroup", "col", "col", "col", "row"]
    assert outline.all("th")[0]["colspan"] == "2"
    assert [td.get("class") for td in outline.all("td")][-3:] == [None, None, "best"]
    assert len(outline.all("caption")) == 1


def test_a_confusion_matrix_is_shaded_by_the_share_of_the_row():
    outline = Outline(page(Matrices([Matrix("m", ["a", "b"], [[30, 10], [0, 0]])])))
    shades = [td["style"] for td in outline.all("td") if "style" in td]
    assert shades == ["--s:0.750", "--s:0.250", "--s:0.000", "--s:0.000"]


def test_markdown_of_the_blocks():
    table = Table("title", ["", "a|b"], [["x", "1"]])
    matrix = Matrices([Matrix("m", ["a|\nb"], [[1000]])])
    blocks = ["words", Finding("open", "Lead.", "text"), Details(table), matrix]
    found = Document("T", "under", [Section("S", blocks)]).markdown()
    assert found.startswith("# T\n\nunder\n\n## S\n\nwords\n\n**Lead.** text\n\n<details><summary>")
    assert "| true \\ predicted | a\\| b |\n| --- | ---: |\n| a\\| b | 1,000 |" in found


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
    assert len(images) == 3 + 3 + 3  # costs, training, validation
    assert any("student" in image["alt"] and "0.88" in image["alt"] for image in images)
    for image in images:
        svg = base64.b64decode(image["src"].split(",")[1]).decode()
        ElementTree.fromstring(svg)
        assert "prefers-color-scheme:dark" in svg
        drawn = re.sub("<style>.*?</style>", "", svg)
        assert "var(--c222222)" in drawn and plots.COLOURS[0].lower() not in drawn


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
    assert len(found["students"]) == 1 + 3 * 3  # all, and each one's quality, classes and cost
    for left, right in found["students"]:
        assert 0 < left < right <= width
    assert found["heading"] == "3 configurations compared"
    assert found["tables"] == len(Outline(report.read_text()).all("table"))
    assert min(found["rows"]) > 0
    assert len(found["images"]) == 9
    for complete, natural, shown in found["images"]:
        assert complete and natural > 300 and 240 < shown < 450
