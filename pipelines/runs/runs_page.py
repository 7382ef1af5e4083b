"""Draws a store's runs as one HTML page: a plot over nights, and a table.

Knows nothing of where records are kept.
"""

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from pipelines import drawing
from pipelines.drawing import ACCENT, INK, MUTED, WARNING, Plot, compact, render, svg_of
from pipelines.runs.report_page import duration_text
from pipelines.runs.run_records import RunNumbers, RunRecord, night

# Of engines, in the order of their first run; more than these look alike.
COLORS = (ACCENT, INK, WARNING, MUTED)
MARKERS = ("o", "s", "^", "D")
# Nights named below the plot: more would run into each other.
MAX_LABELS = 6
Measure = Callable[[RunNumbers], float | None]


def render_runs_page(records: Sequence[RunRecord], *, store_uri: str) -> str:
    """Draw runs, the newest last; an HTML document without scripts, to be written as UTF-8."""
    return render(
        "runs.html",
        filters={"compact": compact, "duration": duration_text, "night": night},
        values={"records": records, "store_uri": store_uri, "plot": nights_plot(records)},
    )


def nights_plot(records: Sequence[RunRecord]) -> Plot | None:
    """Draw rows/s, GPU-seconds and rejects over runs; None if fewer than two embedded anything."""
    measured = [record for record in records if _embedded(record)]
    if len(measured) < 2:
        return None
    has_gpus = any(_of(record, _gpu_seconds) for record in measured)
    panels: list[tuple[str, Measure]] = [("rows/s", lambda numbers: numbers.rows_per_second)]
    panels += [("GPU-seconds per million rows", _gpu_seconds)] if has_gpus else []
    with drawing.figure(height_inches=1.4 + 1.5 * (len(panels) + 1)) as figure:
        axes_of: list[Axes] = list(figure.subplots(len(panels) + 1, sharex=True))
        for axes, (title, measure) in zip(axes_of, panels, strict=False):
            _draw_by_engine(axes, records, measure)
            axes.set_title(title)
        rejects = [_of(record, lambda numbers: numbers.num_rejected) or 0 for record in records]
        axes_of[-1].bar(range(len(records)), rejects, width=0.7, color=WARNING)
        axes_of[-1].set_title("rejects of the run")
        step = -(-len(records) // MAX_LABELS)
        shown = range(0, len(records), step)
        axes_of[-1].set_xticks(list(shown), labels=_labels([records[at] for at in shown]))
        for axes in axes_of:
            axes.grid(visible=True)
            axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
            axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda number, _: compact(number)))
        handles, labels = axes_of[0].get_legend_handles_labels()
        figure.legend(
            *(handles, labels), loc="outside lower center", frameon=False, fontsize=8, ncols=2
        )
        svg = svg_of(figure, name="nights")
    speeds = [_of(record, lambda numbers: numbers.rows_per_second) or 0.0 for record in measured]
    lost = sum(record.status in ("failed", "killed") for record in records)
    return Plot(
        svg=svg,
        alt=f"{len(records)} runs from {night(records[0])} to {night(records[-1])}, of which "
        f"{len(measured)} embedded rows, {compact(min(speeds))} to {compact(max(speeds))} a "
        f"second, the last {compact(speeds[-1])}; {lost} failed or were killed",
    )


def _labels(records: Sequence[RunRecord]) -> list[str]:
    """Days, or times where all are of one day."""
    days, times = zip(*(night(record).split() for record in records), strict=True)
    return list(times) if len(set(days)) == 1 else [day[5:] for day in days]


def _draw_by_engine(axes: Axes, records: Sequence[RunRecord], measure: Measure) -> None:
    engines = dict.fromkeys(_engine(record) for record in records if _embedded(record))
    for number, engine in enumerate(engines):
        at = [
            place
            for place, record in enumerate(records)
            if _embedded(record) and _engine(record) == engine
        ]
        style = min(number, len(COLORS) - 1)
        axes.plot(
            at,
            [_of(records[place], measure) or 0.0 for place in at],
            color=COLORS[style],
            marker=MARKERS[style],
            markersize=4,
            linewidth=1.2,
            label=engine,
        )


def _embedded(record: RunRecord) -> bool:
    return bool(_of(record, lambda numbers: numbers.num_embedded))


def _engine(record: RunRecord) -> str:
    return "" if record.numbers is None else record.numbers.engine_id


def _of(record: RunRecord, measure: Measure) -> float | None:
    return None if record.numbers is None else measure(record.numbers)


def _gpu_seconds(numbers: RunNumbers) -> float | None:
    return numbers.gpu_seconds_per_million
