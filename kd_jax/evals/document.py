"""What a report consists of: sections of sentences, tables and pictures; and it as Markdown.

`html.page` writes the same document for browsers.
"""

import dataclasses

from kd_jax.evals.plots import Panel
from kd_jax.evals.table import Table
from kd_jax.evals.tradeoff import Scatter


@dataclasses.dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


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
    panels: list[Panel] | list[Scatter]
    file: str  # a PNG of them, which Markdown shows; beside the page


@dataclasses.dataclass(frozen=True)
class Details:
    """A table that is there for those who open it."""

    table: Table


Block = Details | Text | Finding | Table | Matrices | Pictures


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


def markdown(document: Document) -> str:
    """The document as Markdown."""
    parts = [f"# {document.title}", document.subtitle]
    for section in document.sections:
        if section.blocks:
            parts += [f"## {section.title}", *map(_block, section.blocks)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _block(block: Block) -> str:
    match block:
        case Text(text):
            return text
        case Finding(_, lead, text):
            return f"**{lead}** {text}"
        case Table():
            return block.markdown()
        case Details(table):
            bare = dataclasses.replace(table, title="").markdown()
            return f"<details><summary>{table.title}</summary>\n\n{bare}\n</details>"
        case Matrices(matrices):
            return "\n".join(matrix_table(matrix).markdown() for matrix in matrices)
        case Pictures(title, _, file):
            return f"![{title}]({file})"


def matrix_table(matrix: Matrix) -> Table:
    """A row for each true class, a column for each predicted one."""
    rows = [
        [name, *(f"{count:,}" for count in row)]
        for name, row in zip(matrix.names, matrix.counts, strict=True)
    ]
    return Table(matrix.title, ["true \\ predicted", *matrix.names], rows)
