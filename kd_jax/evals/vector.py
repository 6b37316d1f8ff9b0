"""Panels as SVG that follows the reader's light or dark screen, in text that can be selected."""

import base64
import io
import re

import matplotlib
from matplotlib.figure import Figure

from kd_jax.evals import plots

INK, EDGE, GRID = "#222222", "#999999", "#e6e6e6"
# What each colour of a drawing becomes on a dark screen; those left out are good on both.
DARK = {
    INK: "#d9dee3",
    EDGE: "#6b737b",
    GRID: "#31373d",
    "#000000": "#f0f0f0",
    "#0072b2": "#4aa9e6",
    "#009e73": "#2fc79b",
    "#666666": "#a4abb2",
    "#d55e00": "#ff8a3d",
}
_STYLE = plots.STYLE | {
    "axes.edgecolor": EDGE,
    "axes.labelcolor": INK,
    "grid.color": GRID,
    "svg.fonttype": "none",
    "text.color": INK,
    "xtick.color": EDGE,
    "xtick.labelcolor": INK,
    "ytick.color": EDGE,
    "ytick.labelcolor": INK,
}


def variables(dark: bool) -> str:
    """The colours as declarations of CSS variables."""
    return "".join(f"{_name(c)}:{DARK[c] if dark else c};" for c in DARK)


def themed(colour: str) -> str:
    """A colour as CSS: a variable where it depends on the screen."""
    return f"var({_name(colour)})" if colour.lower() in DARK else colour


def _name(colour: str) -> str:
    return f"--c{colour.lower()[1:]}"


def draw(panel: plots.Panel) -> str:
    """The panel, without its title, as an image's data URI."""
    # A salt of its own: elements of two pictures must not share ids.
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": panel.title}):
        figure = Figure(figsize=(4.2, 2.8), layout="constrained")
        figure.patch.set_visible(False)
        axes = figure.subplots()
        axes.patch.set_visible(False)
        panel.draw(axes)
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    svg = file.getvalue().decode()
    svg = svg[svg.index("<svg") :]
    svg = re.sub("|".join(DARK), lambda match: themed(match[0]), svg)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: system-ui, sans-serif", svg)
    svg = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), svg)
    theme = (
        f":root{{{variables(False)}}}"
        f"@media screen and (prefers-color-scheme:dark){{:root{{{variables(True)}}}}}"
    )
    svg = svg.replace("<defs>", f"<style>{theme}</style><defs>", 1)
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
