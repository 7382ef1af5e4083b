"""Draws plots as SVG that takes its colours from the page around it, and fills page templates.

Knows nothing of what is plotted. The same numbers give the same bytes.
"""

import io
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib.style
from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

SVG_WIDTH_INCHES = 4.7

# Stand for the page's colours while matplotlib draws, so that a plot turns dark with the page.
INK, MUTED, ACCENT, WARNING = "#010203", "#010204", "#010205", "#010206"
_CSS_COLORS = {INK: "ink", MUTED: "muted", ACCENT: "accent", WARNING: "warning"}
_STYLE: dict[str, object] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "clipmill",
    "text.parse_math": False,
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": MUTED,
    "grid.alpha": 0.25,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Plot:
    """A drawing and its words."""

    svg: Markup
    """An <svg> element that inherits the page's colours."""
    alt: str
    """What it shows, for who cannot see it."""


@contextmanager
def figure(*, height_inches: float) -> Iterator[Figure]:
    """A figure as wide as a page's column, in the page's style; draw within the block."""
    with matplotlib.style.context(["default", _STYLE]):
        yield Figure(figsize=(SVG_WIDTH_INCHES, height_inches), layout="constrained")


def render(
    template: str,
    *,
    filters: Mapping[str, Callable[..., Any]],
    values: Mapping[str, Any],
    package: str = "pipelines",
) -> str:
    """Fill a package's template; an HTML document without scripts, to be written as UTF-8."""
    packages = dict.fromkeys((package, "pipelines"))  # the page that others extend is of the latter
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(name, package_path="") for name in packages]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= filters
    return environment.get_template(template).render(**values)


def compact(number: float) -> str:
    """Three digits and a unit: 1234567 is "1.23M"."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        # 999.5 would be rounded to the next unit.
        if number >= 0.9995 * size:
            return f"{float(f'{number / size:.3g}'):g}{unit}"
    return f"{float(f'{number:.3g}'):g}"


def svg_of(figure: Figure, *, name: str) -> Markup:
    """Write an <svg> element for the inside of an HTML page; `name` keeps its ids apart."""
    stream = io.StringIO()
    # Without a date and a creator there is no metadata element at all.
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(stream, format="svg", transparent=True, metadata=nothing)
    svg = stream.getvalue()
    # HTML knows the namespaces, and the page's style sheet gives the size. Matplotlib's own style
    # element would reach the whole page.
    svg = re.sub(
        r'.*?<svg [^>]*(viewBox="[^"]*")[^>]*>', r"<svg \1>", svg, count=1, flags=re.DOTALL
    )
    svg = re.sub(r"<style.*?</style>", "", svg, count=1, flags=re.DOTALL)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r'(\sid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    for color, variable in _CSS_COLORS.items():
        svg = svg.replace(color, f"var(--{variable})")
    # Matplotlib has escaped the texts, and draws them and shapes, nothing else.
    return Markup(svg)
