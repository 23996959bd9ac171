"""Plots that follow light and dark mode: matplotlib's SVG with colours as CSS variables.

A figure is drawn in the colours of `LIGHT`. `save` then replaces each of them with a variable
whose value depends on `prefers-color-scheme`. Browsers give an image in a page the colour scheme of
the element that shows it, so one file follows the reader's system and a site's toggle. Letters stay
text, in the reader's font. Files do not depend on the day or on a random salt.
"""

import io
import re
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

LIGHT = {
    "text": "#1f2329",
    "quiet": "#5d6670",
    "line": "#d5dbe1",
    "ours": "#c8501e",
    "other": "#8b96a2",
    "blue": "#2b6cb0",
    "green": "#2f855b",
    "violet": "#7e57b2",
}
DARK = {
    "text": "#e4e8ec",
    "quiet": "#a3adb8",
    "line": "#434b55",
    "ours": "#f4854e",
    "other": "#7a8591",
    "blue": "#6cb0f2",
    "green": "#5fc592",
    "violet": "#b79af0",
}
CYCLE = ("other", "ours", "blue", "green", "violet")
WIDTH = 5.0
"""Inches, 480 pixels: text of 10 points is still read where a phone shows it in 350 pixels."""

STYLE: dict[str, Any] = {
    "axes.edgecolor": LIGHT["line"],
    "axes.facecolor": "none",
    "axes.labelcolor": LIGHT["quiet"],
    "axes.labelsize": 10,
    "axes.prop_cycle": matplotlib.cycler(color=[LIGHT[name] for name in CYCLE]),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": LIGHT["text"],
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "figure.facecolor": "none",
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "grid.color": LIGHT["line"],
    "legend.frameon": False,
    "legend.fontsize": 10,
    "legend.labelcolor": LIGHT["text"],
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
    "svg.hashsalt": "optstate",
    "text.color": LIGHT["text"],
    "xtick.color": LIGHT["line"],
    "xtick.labelcolor": LIGHT["quiet"],
    "ytick.color": LIGHT["line"],
    "ytick.labelcolor": LIGHT["quiet"],
}
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"


def style() -> Any:
    """A context in which matplotlib draws in these colours and sizes."""
    return matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE})


def themed(svg: str, title: str) -> str:
    """The SVG with CSS variables in place of the colours, and a title for screen readers."""
    for name, colour in LIGHT.items():
        svg = svg.replace(colour, f"var(--{name})")
    svg = re.sub(r"font-family: [^;\"]*", f"font-family: {FONT}", svg)
    head = re.compile(r"(<svg [^>]*>)\s*<metadata>.*?</metadata>", re.DOTALL)
    css = f":root{{{values(LIGHT)}}}@media(prefers-color-scheme:dark){{:root{{{values(DARK)}}}}}"
    start = rf"\1\n <title>{title}</title>\n <style>{css}</style>"
    svg, found = head.subn(start, svg, count=1)
    if found != 1:
        raise ValueError("no head of an SVG by matplotlib")
    return "".join(f"{line.rstrip()}\n" for line in svg.splitlines())


def values(colours: dict[str, str]) -> str:
    """CSS that sets the variables."""
    return ";".join(f"--{name}:{colour}" for name, colour in colours.items())


def svg_of(figure: Figure, title: str) -> str:
    """The text of the file."""
    file = io.StringIO()
    with style():
        figure.savefig(file, format="svg", metadata={"Date": None})
    return themed(file.getvalue(), title)


def save(figure: Figure, path: Path, title: str) -> None:
    """Write a figure that was drawn inside `style()`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(svg_of(figure, title))
