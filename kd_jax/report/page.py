"""Converts a Markdown report to one HTML page, without scripts, fonts or other files."""

import html
import importlib.resources
from collections.abc import Mapping, Sequence

import jinja2
from markdown_it import MarkdownIt
from markdown_it.token import Token

from kd_jax.report import plots
from kd_jax.report.tables import CONFUSION


def write(text: str, pictures: Mapping[str, Sequence[plots.Panel]], student: str) -> str:
    """Converts Markdown to an HTML page with links to its sections.

    Args:
        text: Markdown from `report.build`.
        pictures: the panels of the pictures in the text, by file name. The page has an image of
            each panel.
        student: the heading of the column that stays visible on a narrow screen.
    """
    reader = MarkdownIt("commonmark").enable("table")

    def framed(_, tokens: Sequence[Token], i: int, *__) -> str:
        """Opens a table inside a scrolling frame, since a page must not scroll sideways."""
        title = html.escape(_text(tokens[i - 2]))
        return f'<div class="scroll" tabindex="0" role="region" aria-label="{title}"><table>\n'

    def images(_, tokens: Sequence[Token], i: int, *__) -> str:
        drawn = plots.images(pictures[tokens[i].attrs["src"]])
        return "\n".join(f'<img src="{uri}" alt="{html.escape(said)}">' for uri, said in drawn)

    reader.add_render_rule("table_open", framed)
    reader.add_render_rule("table_close", lambda *_: "</table></div>\n")
    reader.add_render_rule("image", images)
    # A figure breaks before its ±, if at all.
    tokens, titles = reader.parse(text.replace("± ", "±\u00a0")), []
    for i, token in enumerate(tokens):
        if token.type == "heading_open":
            titles.append(_text(tokens[i + 1]))
            token.attrSet("id", titles[-1].lower().replace(" ", "-"))
    _mark_tables(tokens, student)
    frame = importlib.resources.files(__package__).joinpath("page.html").read_text()
    body = reader.renderer.render(tokens, reader.options, {})
    return jinja2.Template(frame, autoescape=True).render(titles=titles, body=body)


def _text(inline: Token) -> str:
    return "".join(child.content for child in inline.children or ())


def _mark_tables(tokens: Sequence[Token], student: str) -> None:
    """Turns the first cells of rows into headings, marks the student's columns, and shades counts
    in confusion matrices by their share of the row."""
    header, row = [], []
    for i, token in enumerate(tokens):
        if token.type == "tr_open":
            row = []
        elif token.type in ("th_open", "td_open"):
            row.append((token, _text(tokens[i + 1]), tokens[i + 2]))
        elif token.type == "tr_close":
            if row[0][0].tag == "th":
                header = [text for _, text, _ in row]
            _mark_row(row, header, student)


def _mark_row(row: Sequence[tuple[Token, str, Token]], header: Sequence[str], student: str) -> None:
    """Marks the cells of one row, each (opening token, text, closing token)."""
    for (cell, *_), name in zip(row, header, strict=True):
        if name == student:
            cell.attrSet("class", "student")
    first, _, last = row[0]
    if first.tag == "th":
        for cell, *_ in row:
            cell.attrSet("scope", "col")
    else:
        first.tag = last.tag = "th"
        first.attrSet("scope", "row")
        if header[0] == CONFUSION:
            counts = [int(text.replace(",", "")) for _, text, _ in row[1:]]
            for (cell, *_), count in zip(row[1:], counts, strict=True):
                cell.attrSet("style", f"--s:{count / (sum(counts) or 1):.3f}")
