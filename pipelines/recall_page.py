"""Draws what indexes find at each setting as one HTML page.

Knows nothing of how it was measured.
"""

from collections.abc import Sequence

from matplotlib.ticker import LogLocator

from pipelines import drawing
from pipelines.drawing import ACCENT, MUTED, WARNING, Plot, render, svg_of
from pipelines.indexes.manifest import IndexManifest
from pipelines.runs.report_page import size_text

COLORS = (ACCENT, WARNING)
MARKERS = ("o", "s")


def render_recall_page(manifests: Sequence[IndexManifest]) -> str:
    """Draw the indexes of a snapshot; an HTML document without scripts, to be written as UTF-8."""
    plots = {
        manifest.modality: _plot(manifest)
        for manifest in manifests
        if len({entry.setting for entry in manifest.measured}) > 1
    }
    return render(
        "recall.html", filters={"size": size_text}, values={"manifests": manifests, "plots": plots}
    )


def _plot(manifest: IndexManifest) -> Plot:
    """Recall@10 over the time of a search, a line for each kind of queries."""
    kinds = dict.fromkeys(entry.kind for entry in manifest.measured)
    said = []
    with drawing.figure(height_inches=3.0) as figure:
        axes = figure.subplots()
        for kind, color, marker in zip(kinds, COLORS, MARKERS, strict=False):
            measured = [entry for entry in manifest.measured if entry.kind == kind]
            milliseconds = [entry.search_seconds * 1e3 for entry in measured]
            recalls = [entry.recall["10"] for entry in measured]
            name = f"{kind} queries"
            axes.plot(milliseconds, recalls, color=color, marker=marker, markersize=4, label=name)
            chosen = [entry.setting for entry in measured].index(manifest.setting)
            axes.annotate(
                f"{manifest.setting}",
                (milliseconds[chosen], recalls[chosen]),
                xytext=(0, 7 if color == ACCENT else -14),
                textcoords="offset points",
                color=color,
            )
            said.append(f"{name} {recalls[chosen]:.3f} in {milliseconds[chosen]:.2f} ms")
        axes.axhline(manifest.min_recall, color=MUTED, linestyle="--", linewidth=1)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(lambda number, _: f"{number:g}")
        axes.minorticks_off()
        axes.grid(visible=True)
        axes.set_xlabel("ms a search, one thread")
        axes.set_title("recall@10")
        figure.legend(loc="outside lower center", frameon=False, fontsize=8, ncols=2)
        svg = svg_of(figure, name=f"{manifest.modality}-recall")
    return Plot(
        svg=svg,
        alt=f"Recall of the ten nearest over the time of a search; searches use setting "
        f"{manifest.setting}: {', '.join(said)}; {manifest.min_recall:g} was asked for",
    )
