"""Draws a gate's report as one HTML page: the verdict, what was measured, and histograms.

Knows nothing of how the numbers were measured.
"""

from collections.abc import Sequence

from engine.accuracy import RECALL_CUTOFFS
from engine.gate import GateReport, Histogram
from engine.manifest import Manifest
from engine.speeds import Speed
from pipelines import drawing
from pipelines.drawing import ACCENT, WARNING, Plot, render, svg_of
from pipelines.runs.report_page import size_text


def render_gate_page(report: GateReport, *, manifest: Manifest) -> str:
    """Draw a report.

    Args:
        report: What the gate saw.
        manifest: Of the engine.

    Returns:
        An HTML document without scripts; write it as UTF-8.
    """
    quantization = manifest.quantization
    return render(
        "gate.html",
        filters={"size": size_text},
        values={
            "report": report,
            "manifest": manifest,
            "kept": quantization.kept_in_words() if quantization else "",
            "cutoffs": RECALL_CUTOFFS,
            "encoders": list(dict.fromkeys(speed.encoder for speed in report.speeds)),
            "speeds": _side_by_side(report.speeds),
            "histograms": {
                modality: histogram_plot(
                    histogram, modality=modality, threshold=report.thresholds.min_cosine_p1
                )
                for modality, histogram in report.histograms.items()
            },
        },
    )


def _side_by_side(speeds: Sequence[Speed]) -> dict[tuple[str, int], dict[str, float]]:
    """Modality and rows of a batch -> encoder -> rows/s."""
    rows: dict[tuple[str, int], dict[str, float]] = {}
    for speed in speeds:
        row = rows.setdefault((speed.modality, speed.batch_rows), {})
        row[speed.encoder] = speed.rows_per_second
    return rows


def histogram_plot(histogram: Histogram, *, modality: str, threshold: float) -> Plot:
    """Draw how many rows have which cosine, and where the 1st percentile must lie.

    Args:
        histogram: Of one modality.
        modality: Its name, which keeps the drawing's ids apart.
        threshold: Of the 1st percentile.
    """
    with drawing.figure(height_inches=2.4) as figure:
        axes = figure.subplots()
        axes.stairs(histogram.counts, histogram.edges, fill=True, color=ACCENT, alpha=0.35)
        axes.stairs(histogram.counts, histogram.edges, color=ACCENT, linewidth=1.2)
        axes.axvline(threshold, color=WARNING, linewidth=1, linestyle=(0, (4, 3)))
        first, last = min(histogram.edges[0], threshold), histogram.edges[-1]
        axes.set_xlim(first - 0.02 * (last - first), last)  # room for the dashed line
        axes.set_ylim(bottom=0)
        axes.set_title(f"rows by cosine (dashed: {threshold:g}, for the 1st percentile)")
        axes.set_xlabel("cosine to the float32 reference")
        svg = svg_of(figure, name=f"histogram-{modality}")
    bins = list(zip(histogram.counts, histogram.edges, histogram.edges[1:], strict=False))
    # Rows of the bin that the threshold cuts may lie on either side of it.
    fewest = sum(count for count, _, end in bins if end <= threshold)
    most = sum(count for count, start, _ in bins if start < threshold)
    below = f"{fewest:,}" if fewest == most else f"{fewest:,} to {most:,}"
    return Plot(
        svg=svg,
        alt=f"{modality}: {sum(histogram.counts):,} rows, {below} of them below {threshold:g}",
    )
