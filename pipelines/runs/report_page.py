"""Draws a run's report as one HTML page: numbers, plots, and a contact sheet of example queries.

Knows nothing of how the numbers were counted or which queries were asked. The page loads nothing
from elsewhere, and the same report gives the same bytes.
"""

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator
from PIL import Image

from engine.images import ImageLimits, ImageRejected, rgb_image
from pipelines import drawing
from pipelines.counts import plan_line
from pipelines.drawing import ACCENT, INK, WARNING, Plot, compact, render, svg_of
from pipelines.runs.report import RunReport

MAX_THUMBNAIL_PIXELS = 160
# A picture that is small already but heavier than this (metadata, noise) is made again as JPEG.
MAX_INLINE_BYTES = 16 * 2**10
JPEG_QUALITY = 82
# More steps than this cannot be told apart in a plot as wide as a phone.
MAX_INTERVALS = 200
# Longer names of reasons would leave no room for their bars.
MAX_LABEL_CHARACTERS = 30
SIZE_UNITS = ("KiB", "MiB", "GiB", "TiB", "PiB")

_MIME_TYPES = (
    (re.compile(rb"\xff\xd8\xff"), "image/jpeg"),
    (re.compile(rb"\x89PNG\r\n\x1a\n"), "image/png"),
    (re.compile(rb"RIFF.{4}WEBP", re.DOTALL), "image/webp"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Hit:
    """One row that a query found."""

    key: str
    """Of the catalog."""
    score: float
    """Cosine similarity with the query."""
    image: bytes | None
    """Encoded as in the catalog; None for a row without a picture."""
    caption: str | None
    """The row's text; None for a row without one."""
    is_expected: bool
    """Whether this is the row that the query should find."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QuerySheet:
    """One query and what it found."""

    query: str
    """The text asked for; beside a `query_image`, what it is called."""
    query_image: bytes | None
    """Encoded picture asked for; None for a query by text."""
    hits: tuple[Hit, ...]
    """Best first."""


def render_page(report: RunReport, *, sheets: Sequence[QuerySheet] = ()) -> str:
    """Draw a report.

    Args:
        report: The run.
        sheets: Example queries for the contact sheet. A picture that cannot be decoded is
            replaced by the reason why.

    Returns:
        An HTML document without scripts; write it as UTF-8.
    """
    return render(
        "report.html",
        filters={
            "size": size_text,
            "duration": duration_text,
            "thumbnail": thumbnail_uri,
            "plan": plan_line,
        },
        values={
            "report": report,
            "sheets": sheets,
            "rate": rate_plot(report.samples),
            "rejects": rejects_plot(report.rejects_by_reason),
        },
    )


def size_text(num_bytes: int) -> str:
    """Bytes in binary units, three digits: 1536 is "1.50 KiB"."""
    if num_bytes < 1024:
        return f"{num_bytes} B"
    size, power = num_bytes / 1024, 0
    # 999.5 and above would be rounded to four digits.
    while size >= 999.5 and power < len(SIZE_UNITS) - 1:
        size, power = size / 1024, power + 1
    digits = 2 if size < 9.995 else 1 if size < 99.95 else 0
    return f"{size:,.{digits}f} {SIZE_UNITS[power]}"


def duration_text(seconds: float) -> str:
    """Seconds as a person says them: "4.2 s", "3 min 05 s", "2 h 10 min"."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    if seconds < 3599.5:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest:02d} s"
    hours, rest = divmod(round(seconds / 60), 60)
    return f"{hours:,} h {rest:02d} min"


def thumbnail_uri(encoded: bytes) -> tuple[str | None, str]:
    """Make a data URI of a picture of at most MAX_THUMBNAIL_PIXELS.

    Returns:
        The URI and "", or None and the reason why the bytes are no usable image.
    """
    try:
        image = rgb_image(encoded, limits=ImageLimits())
    except ImageRejected as error:
        return None, error.reason
    mime_type = _mime_type(encoded)
    fits = max(image.size) <= MAX_THUMBNAIL_PIXELS and len(encoded) <= MAX_INLINE_BYTES
    if mime_type is None or not fits:
        image.thumbnail((MAX_THUMBNAIL_PIXELS, MAX_THUMBNAIL_PIXELS), Image.Resampling.LANCZOS)
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=JPEG_QUALITY, optimize=True)
        encoded, mime_type = stream.getvalue(), "image/jpeg"
    return f"data:{mime_type};base64,{base64.b64encode(encoded).decode('ascii')}", ""


def _mime_type(encoded: bytes) -> str | None:
    for signature, mime_type in _MIME_TYPES:
        if signature.match(encoded):
            return mime_type
    return None


def rate_plot(samples: Sequence[tuple[float, int]]) -> Plot | None:
    """Draw rows per second, and rows so far, over the run.

    Args:
        samples: (seconds, rows so far), in the order of time.

    Returns:
        None if the samples span no time.
    """
    points = _apart(samples)
    if len(points) < 2:
        return None
    seconds, counts = zip(*points, strict=True)
    rates = [
        (count - before_count) / (end - start)
        for (start, before_count), (end, count) in pairwise(points)
    ]
    span, num_rows = seconds[-1] - seconds[0], counts[-1] - counts[0]
    mean = num_rows / span
    unit, unit_seconds = _time_unit(seconds[-1])
    times = [second / unit_seconds for second in seconds]

    with drawing.figure(height_inches=3.5) as figure:
        rate_axes, count_axes = figure.subplots(2, sharex=True, height_ratios=(3, 2))
        rate_axes.stairs(rates, times, fill=True, color=ACCENT, alpha=0.3)
        rate_axes.stairs(rates, times, color=ACCENT, linewidth=1.2)
        rate_axes.axhline(mean, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        rate_axes.set_title(f"rows/s (dashed: mean {compact(mean)})")
        count_axes.plot(times, counts, color=ACCENT, linewidth=1.6)
        count_axes.set_title("rows so far")
        count_axes.set_xlabel(unit)
        for axes in (rate_axes, count_axes):
            axes.set_ylim(bottom=0)
            axes.set_xlim(times[0], times[-1])
            axes.grid(visible=True)
            axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda number, _: compact(number)))
        svg = svg_of(figure, name="rate")
    return Plot(
        svg=svg,
        alt=(
            f"{num_rows:,} rows encoded in {duration_text(span)}: {compact(mean)} rows/s on "
            f"average, between {compact(min(rates))} and {compact(max(rates))}"
        ),
    )


def _apart(samples: Sequence[tuple[float, int]]) -> list[tuple[float, int]]:
    """Drop samples until all are some time apart; the counts are cumulative, so no row is lost."""
    if not samples or samples[-1][0] <= samples[0][0]:
        return list(samples[:1])
    first, last = samples[0], samples[-1]
    step = (last[0] - first[0]) / MAX_INTERVALS
    points = [first]
    for point in samples[1:-1]:
        # The last sample stays whatever its distance, so what is near it goes.
        if point[0] - points[-1][0] >= step and last[0] - point[0] >= step:
            points.append(point)
    return [*points, last]


def _time_unit(seconds: float) -> tuple[str, float]:
    if seconds < 180:
        return "seconds", 1.0
    if seconds < 3 * 3600:
        return "minutes", 60.0
    return "hours", 3600.0


def rejects_plot(rejects_by_reason: dict[str, int]) -> Plot | None:
    """Draw a bar for each reason, the most frequent first.

    Returns:
        None if nothing was rejected.
    """
    rejects = sorted(
        ((reason, count) for reason, count in rejects_by_reason.items() if count),
        key=lambda entry: (-entry[1], entry[0]),
    )
    if not rejects:
        return None
    reasons, counts = zip(*rejects, strict=True)
    with drawing.figure(height_inches=0.4 + 0.34 * len(rejects)) as figure:
        axes: Axes = figure.subplots()
        bars = axes.barh(range(len(rejects)), counts, height=0.62, color=WARNING)
        axes.bar_label(bars, labels=[f"{count:,}" for count in counts], padding=4)
        axes.set_yticks(
            range(len(rejects)), labels=[reason[:MAX_LABEL_CHARACTERS] for reason in reasons]
        )
        axes.invert_yaxis()
        axes.set_xlim(0, max(counts))
        axes.xaxis.set_visible(False)
        axes.spines["bottom"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        svg = svg_of(figure, name="rejects")
    listed = ", ".join(f"{reason} {count:,}" for reason, count in rejects)
    return Plot(svg=svg, alt=f"Rejects by reason: {listed}")
