"""Plots that turn dark with their page, and templates that miss nothing."""

import re
from collections.abc import Callable

import jinja2
import matplotlib
import pytest
from matplotlib.axes import Axes

from pipelines import drawing
from pipelines.drawing import ACCENT, INK, MUTED, WARNING, compact, render, svg_of
from tests.pages import HOSTILE, Page

COLORS = {"ink": INK, "muted": MUTED, "accent": ACCENT, "warning": WARNING}


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (0.0125, "0.0125"),
        (7, "7"),
        (12.345, "12.3"),
        (999.4, "999"),
        (999.5, "1k"),
        (1000, "1k"),
        (1234, "1.23k"),
        (40_000, "40k"),
        (999_499, "999k"),
        (999_500, "1M"),
        (1_234_567, "1.23M"),
        (999_499_999, "999M"),
        (2.5e9, "2.5G"),
        (123e9, "123G"),
    ],
)
def test_numbers_in_three_digits(number: float, text: str) -> None:
    assert compact(number) == text


def line(axes: Axes) -> None:
    """Something of each colour, with a marker and a clipped line, which matplotlib refers to."""
    axes.plot([0, 1, 2], [3, 1, 2], color=ACCENT, marker="o")
    axes.axhline(2, color=WARNING)
    axes.grid(visible=True)
    axes.set_title("rows")


def line_and_mark(axes: Axes) -> None:
    line(axes)
    axes.axvline(1)


def hostile(axes: Axes) -> None:
    axes.set_title(f"{HOSTILE} $x$ costs $y$")


def drawn(draw: Callable[[Axes], None] = line, *, name: str = "rate") -> str:
    with drawing.figure(height_inches=2) as figure:
        draw(figure.subplots())
        return svg_of(figure, name=name)


def test_same_numbers_same_bytes() -> None:
    first = drawn()
    others = {"lines.linewidth": 9, "font.size": 30, "svg.hashsalt": None, "svg.fonttype": "path"}
    with matplotlib.rc_context(others):
        assert drawn() == first
    assert drawn(line_and_mark) != first


def test_the_style_is_that_of_the_block_alone() -> None:
    drawn()
    assert matplotlib.rcParams["text.color"] == "black"
    assert matplotlib.rcParams["axes.spines.top"] is True


def test_ids_of_two_drawings_on_a_page_are_apart() -> None:
    ids, references = {}, {}
    for name in ("rate", "histogram-image"):
        svg = drawn(name=name)
        page = Page(svg)
        ids[name] = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
        references[name] = [attributes["href"] for attributes in page.all("use")]
        references[name] += re.findall(r"url\((#[^)]*)\)", svg)
        assert len(references[name]) > 5
        assert all(found.startswith(f"{name}-") for found in ids[name])
        assert {found.removeprefix("#") for found in references[name]} <= set(ids[name])
        assert "xlink" not in svg
    assert not set(ids["rate"]) & set(ids["histogram-image"])


def test_colours_are_those_of_the_page() -> None:
    svg = drawn()
    used = set(re.findall(r"(?:fill|stroke): ([^;\"]+)", svg))
    assert used == {"none", *(f"var(--{name})" for name in COLORS)}
    assert not re.search("#0102", svg)


def test_the_drawing_styles_nothing_but_itself() -> None:
    svg = drawn()
    assert "<style" not in svg
    assert "<metadata" not in svg
    assert svg.startswith('<svg viewBox="0 0 ')
    page = Page(svg)
    assert page.elements[0][1].keys() == {"viewbox"}, "the page gives the size"
    assert page.elements[0][0] == "svg"
    assert page.all("text"), "texts stay texts"


def test_labels_are_texts_and_no_markup() -> None:
    page = Page(drawn(hostile))
    assert page.all("script") == page.all("img") == []
    (title,) = (text for text in page.texts if "alert" in text[1])
    assert title == ("text", f"{HOSTILE} $x$ costs $y$")


def test_values_are_escaped_and_drawings_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    use_template(monkeypatch, "<p>{{ word }}</p>{{ plot }}<b>{{ 2 | twice }}</b>")
    with drawing.figure(height_inches=2) as figure:
        line(figure.subplots())
        plot = svg_of(figure, name="a")
    page = Page(
        render("t.html", filters={"twice": lambda n: 2 * n}, values={"word": HOSTILE, "plot": plot})
    )
    assert page.text("p") == HOSTILE
    assert len(page.all("svg")) == 1
    assert page.text("b") == "4"
    assert page.all("script") == []


@pytest.mark.parametrize(
    "template", ["{{ missing }}", "{{ known.missing }}", "{% if missing %}x{% endif %}"]
)
def test_a_value_that_is_not_given_is_an_error(
    monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    use_template(monkeypatch, template)
    with pytest.raises(jinja2.UndefinedError, match="missing"):
        render("t.html", filters={}, values={"known": {}})


def test_a_page_without_its_values_is_an_error() -> None:
    with pytest.raises(jinja2.UndefinedError, match="'report' is undefined"):
        render("gate.html", filters={"size": str}, values={})


def use_template(monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    monkeypatch.setattr(
        drawing, "PackageLoader", lambda *_, **__: jinja2.DictLoader({"t.html": content})
    )
