"""A report as one HTML page that needs nothing else: no script, no font, no file beside it."""

import html
from itertools import chain

from kd_jax.evals import document, vector
from kd_jax.evals.document import Details, Finding, Matrices, Matrix, Pictures, Section, Text
from kd_jax.evals.plots import Key
from kd_jax.evals.style import CSS
from kd_jax.evals.table import Table

_DASHES = {"-": "", "--": "6 3", ":": "2 3", "-.": "7 3 2 3"}
_SHAPES = {  # markers of matplotlib, in a box of 24 by 12
    "o": '<circle cx="12" cy="6" r="4.5" />',
    "s": '<path d="M8 2h8v8h-8z" />',
    "D": '<path d="M12 .5l5.5 5.5l-5.5 5.5l-5.5 -5.5z" />',
    "^": '<path d="M12 1l5 9.5h-10z" />',
}


def page(report: document.Document) -> str:
    """The document as HTML."""
    sections = [section for section in report.sections if section.blocks]
    links = "".join(
        f'<li><a href="#{_anchor(section)}">{_text(section.title)}</a></li>' for section in sections
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{_text(report.title)}</title>
<style>
:root {{ {vector.variables(False)} }}
@media screen and (prefers-color-scheme: dark) {{ :root {{ {vector.variables(True)} }} }}
{CSS}</style>
</head>
<body>
<header>
<h1>{_text(report.title)}</h1>
<p class="subtitle">{_text(report.subtitle)}</p>
<nav aria-label="Sections"><ul>{links}</ul></nav>
</header>
<main>
{"".join(map(_section, sections))}</main>
</body>
</html>
"""


def _section(section: Section) -> str:
    blocks = "\n".join(map(_block, section.blocks))
    name = _anchor(section)
    heading = f'<h2 id="{name}">{_text(section.title)}</h2>'
    return f'<section aria-labelledby="{name}">\n{heading}\n{blocks}\n</section>\n'


def _block(block: document.Block) -> str:
    match block:
        case Text(text):
            return f"<p>{_text(text)}</p>"
        case Finding(verdict, lead, text):
            return f'<p class="finding {verdict}"><strong>{_text(lead)}</strong> {_text(text)}</p>'
        case Table():
            return _table(block)
        case Details(table):
            inside = _table(table)
            return f"<details><summary>{_text(table.title)}</summary>\n{inside}\n</details>"
        case Matrices(matrices):
            return f'<div class="matrices">{"".join(map(_matrix, matrices))}</div>'
        case Pictures():
            return _pictures(block)


def _table(table: Table) -> str:
    head = ""
    if table.spans:
        over = "".join(
            f'<th scope="colgroup" colspan="{width}">{_text(name)}</th>'
            if name
            else f'<td colspan="{width}"></td>'
            for name, width in table.spans
        )
        head = f'<tr class="over"><td colspan="{table.labels}"></td>{over}</tr>\n'
    kinds = ["l" * (i < table.labels) for i in range(len(table.header))]
    if "student" in table.header and not table.spans:
        kinds[table.header.index("student")] = "student"
    cells = [_head(*each) for each in zip(table.header, kinds, strict=True)]
    head += f"<tr>{''.join(cells)}</tr>"
    rows = []
    for i, row in enumerate(table.rows):
        cells = [f'<th scope="row">{_text(row[0])}</th>']
        for j, cell in enumerate(row[1:], 1):
            kind = "l " * (j < table.labels) + "best " * ((i, j) in table.best)
            kind += "student" * (table.header[j] == "student" and not table.spans)
            figure = _text(cell).replace("± ", "±&nbsp;")  # where a narrow cell may be broken
            inside = f"<strong>{figure}</strong>" if (i, j) in table.best else figure
            cells.append(f"<td{_class(kind)}>{inside}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    kind = "text" if table.labels == len(table.header) else "spans" * bool(table.spans)
    return _scrolled(table.title, head, rows, kind)


def _matrix(matrix: Matrix) -> str:
    """Counts on a colour that is the share of the row."""
    n = len(matrix.names)
    head = f'<tr class="over"><td></td><th scope="colgroup" colspan="{n}">predicted</th></tr>\n'
    names = "".join(_head(name) for name in matrix.names)
    head += f'<tr><th scope="col" class="l">true</th>{names}</tr>'
    rows = []
    for name, counts in zip(matrix.names, matrix.counts, strict=True):
        total = sum(counts) or 1
        cells = "".join(f'<td style="--s:{x / total:.3f}">{x:,}</td>' for x in counts)
        rows.append(f'<tr><th scope="row">{_text(name)}</th>{cells}</tr>')
    return _scrolled(matrix.title, head, rows, "matrix")


def _scrolled(title: str, head: str, rows: list[str], kind: str) -> str:
    """A table in a frame of its own, since a page must not scroll sideways."""
    body = "\n".join(rows)
    return f"""<div class="scroll" tabindex="0" role="region" aria-label="{_text(title)}">
<table{_class(kind)}>
<caption><span>{_text(title)}</span></caption>
<thead>
{head}
</thead>
<tbody>
{body}
</tbody>
</table>
</div>"""


def _pictures(pictures: Pictures) -> str:
    figures = "\n".join(
        f'<figure><figcaption>{_text(panel.title)}</figcaption><img src="{vector.draw(panel)}" '
        f'width="420" height="280" alt="{_text(panel.describe())}"></figure>'
        for panel in pictures.panels
    )
    keys = {key.label: key for key in chain(*(panel.keys() for panel in pictures.panels))}
    legend = "".join(f"<li>{_swatch(key)}{_text(key.label)}</li>" for key in keys.values())
    return f'<ul class="legend">{legend}</ul>\n<div class="panels">\n{figures}\n</div>'


def _swatch(key: Key) -> str:
    colour = vector.themed(key.colour)
    if key.marker:
        inside = f'<g style="fill:{colour}">{_SHAPES[key.marker]}</g>'
    else:
        style = f"stroke:{colour};stroke-width:2.5;stroke-dasharray:{_DASHES[key.dash] or 'none'}"
        inside = f'<path d="M0 6h24" style="{style}" />'
    return f'<svg viewBox="0 0 24 12" width="24" height="12" aria-hidden="true">{inside}</svg>'


def _head(name: str, kind: str = "") -> str:
    return f'<th scope="col"{_class(kind)}>{_text(name)}</th>' if name else "<td></td>"


def _class(names: str) -> str:
    return f' class="{names.strip()}"' if names else ""


def _anchor(section: Section) -> str:
    return "-".join(section.title.lower().split())


def _text(text: str) -> str:
    return html.escape(text)
