"""Reports as Markdown and as one HTML page that needs nothing else: no script, no font, no file
beside it. A report consists of sections of sentences, tables and pictures."""

import base64
import dataclasses
import importlib.resources
import io
import re
from itertools import chain

import jinja2
import matplotlib
from matplotlib.figure import Figure

from kd_jax.report import plots
from kd_jax.report.pictures import Point, Scatter
from kd_jax.report.table import Table


@dataclasses.dataclass(frozen=True)
class Finding:
    """A paragraph that answers a question of the reader, with the answer in a few words first."""

    verdict: str  # better | worse | open: how it is marked
    lead: str
    text: str


@dataclasses.dataclass(frozen=True)
class Matrix:
    """Counts [true][predicted] of a classifier."""

    title: str
    names: list[str]
    counts: list[list[int]]


@dataclasses.dataclass(frozen=True)
class Matrices:
    """Confusion matrices side by side."""

    matrices: list[Matrix]


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Panels beside each other that share a legend."""

    title: str
    panels: list[plots.Panel] | list[Scatter]
    file: str  # a PNG of them, which Markdown shows; beside the page

    @property
    def legend(self) -> list[plots.Line] | list[Point]:
        """The entries of the legend, each once."""
        keys = chain(*(panel.keys() for panel in self.panels))
        return list({key.label: key for key in keys}.values())


@dataclasses.dataclass(frozen=True)
class Details:
    """A table that is there for those who open it."""

    table: Table


Block = str | Details | Finding | Table | Matrices | Pictures


@dataclasses.dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    title: str
    blocks: list[Block]


@dataclasses.dataclass(frozen=True)
class Document:
    """A title, a line under it, and sections; those without blocks are left out."""

    title: str
    subtitle: str
    sections: list[Section]

    def markdown(self) -> str:
        """Writes the document as Markdown."""
        parts = [f"# {self.title}", self.subtitle]
        for section in self.sections:
            if section.blocks:
                parts += [f"## {section.title}", *map(_markdown, section.blocks)]
        return "\n\n".join(part.strip() for part in parts) + "\n"

    def html(self) -> str:
        """Writes the document as HTML."""
        template = importlib.resources.files(__package__).joinpath("page.html").read_text()
        frame = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        return frame.from_string(template).render(
            report=self, theme=_THEME, themed=_themed, draw=draw
        )


def _markdown(block: Block) -> str:
    match block:
        case str():
            return block
        case Finding(_, lead, text):
            return f"**{lead}** {text}"
        case Table():
            return block.markdown()
        case Details(table):
            bare = dataclasses.replace(table, title="").markdown()
            return f"<details><summary>{table.title}</summary>\n\n{bare}\n</details>"
        case Matrices(matrices):
            return "\n".join(map(_matrix, matrices))
        case Pictures(title, _, file):
            return f"![{title}]({file})"


def _matrix(matrix: Matrix) -> str:
    """A row for each true class, a column for each predicted one."""
    counts = zip(matrix.names, matrix.counts, strict=True)
    rows = [[name, *(f"{count:,}" for count in row)] for name, row in counts]
    return Table(matrix.title, ["true \\ predicted", *matrix.names], rows).markdown()


_INK, _EDGE, _GRID = "#222222", "#999999", "#e6e6e6"
# What each colour of a drawing becomes on a dark screen; those left out are good on both.
_DARK = {
    _INK: "#d9dee3",
    _EDGE: "#6b737b",
    _GRID: "#31373d",
    "#000000": "#f0f0f0",
    "#0072b2": "#4aa9e6",
    "#009e73": "#2fc79b",
    "#666666": "#a4abb2",
    "#d55e00": "#ff8a3d",
}
_STYLE = plots.STYLE | {
    **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), _EDGE),
    **dict.fromkeys(
        ("axes.labelcolor", "text.color", "xtick.labelcolor", "ytick.labelcolor"), _INK
    ),
    "grid.color": _GRID,
    "svg.fonttype": "none",
}


def _name(colour: str) -> str:
    return f"--c{colour.lower()[1:]}"


def _themed(colour: str) -> str:
    """A colour as CSS: a variable where it depends on the screen."""
    return f"var({_name(colour)})" if colour.lower() in _DARK else colour


_light, _dark = (
    ":root{" + "".join(f"{_name(c)}:{dark if i else c};" for c, dark in _DARK.items()) + "}"
    for i in range(2)
)
_THEME = f"{_light}@media screen and (prefers-color-scheme:dark){{{_dark}}}"


def draw(panel: plots.Panel | Scatter) -> str:
    """Draws the panel, without its title, as the data URI of an SVG image that follows the reader's
    light or dark screen, in text that can be selected."""
    # A salt of its own: elements of two pictures must not share ids.
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": panel.title}):
        figure = Figure(figsize=(4.2, 2.8), layout="constrained")
        axes = figure.subplots()
        for each in (figure, axes):
            each.patch.set_visible(False)
        panel.draw(axes)
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    svg = file.getvalue().decode()
    svg = svg[svg.index("<svg") :]
    svg = re.sub("|".join(_DARK), lambda match: _themed(match[0]), svg)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: system-ui, sans-serif", svg)
    svg = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), svg)
    svg = svg.replace("<defs>", f"<style>{_THEME}</style><defs>", 1)
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
