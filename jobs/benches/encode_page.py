"""Draws what `clipmill bench encode` found as one HTML page.

Knows nothing of how it was measured.
"""

from collections.abc import Callable

from matplotlib.ticker import LogLocator

from jobs.benches.encode_figures import EncodeFigures, Timing
from pipelines import drawing
from pipelines.drawing import ACCENT, INK, MUTED, WARNING, Plot, compact, render, svg_of
from pipelines.runs.report_page import size_text

COLORS = (MUTED, ACCENT, WARNING, INK)
THROUGHPUT, LATENCY = "rows/s", "p50 ms"
MARKERS = ("D", "o", "s", "^")


def render_encode_page(figures: EncodeFigures) -> str:
    """Draw the figures; an HTML document without scripts, to be written as UTF-8."""
    modalities = dict.fromkeys(
        timing.modality for encoder in figures.encoders for timing in encoder.timings
    )
    plots = {}
    for modality in modalities:
        plots[f"{modality}-throughput"] = _plot(
            figures,
            modality=modality,
            what=THROUGHPUT,
            value=lambda timing: max(timing.rows_per_second, timing.stream_rows_per_second),
        )
        plots[f"{modality}-latency"] = _plot(
            figures, modality=modality, what=LATENCY, value=lambda timing: timing.p50_ms
        )
    return render(
        "encode.html",
        package="jobs.benches",
        filters={"size": size_text},
        values={
            "figures": figures,
            "plots": plots,
            "rate": figures.product_tflops.get(figures.product_type),
        },
    )


def _plot(
    figures: EncodeFigures, *, modality: str, what: str, value: Callable[[Timing], float]
) -> Plot:
    found, batch_sizes = [], set()
    with drawing.figure(height_inches=3.0) as figure:
        axes = figure.subplots()
        for encoder, color, marker in zip(figures.encoders, COLORS, MARKERS, strict=False):
            timings = [timing for timing in encoder.timings if timing.modality == modality]
            if not timings:
                continue
            rows, values = [timing.batch_rows for timing in timings], list(map(value, timings))
            axes.plot(rows, values, color=color, marker=marker, markersize=4, label=encoder.name)
            batch_sizes.update(rows)
            found.append(f"{encoder.name} {compact(values[0])} to {compact(values[-1])}")
        axes.set_xscale("log", base=2)
        if what == LATENCY:  # over three orders of magnitude
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        else:
            axes.set_ylim(bottom=0)
        ticks = sorted(batch_sizes)
        axes.set_xticks(ticks, [f"{number:,}" for number in ticks])
        axes.minorticks_off()
        axes.yaxis.set_major_formatter(lambda number, _: compact(number))
        axes.grid(visible=True)
        axes.set_xlabel("rows of a call")
        axes.set_title(what)
        figure.legend(loc="outside lower center", frameon=False, fontsize=8, ncols=2)
        svg = svg_of(figure, name=f"{modality}-{what.replace('/', '-').replace(' ', '-')}")
    return Plot(
        svg=svg,
        alt=f"{modality}, {what} from the smallest to the largest batch: {'; '.join(found)}",
    )
