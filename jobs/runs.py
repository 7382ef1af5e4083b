"""`clipmill runs list|show|compare`: what the runs of a store did, and how fast.

Knows nothing of how a run is done or put on record.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.redaction import public_uri, redacted
from jobs.command import Actions, CommandParser, dispatch, print_result, run
from pipelines.errors import StoreError
from pipelines.runs.run_history import find_run, read_history, readable, run_before
from pipelines.runs.run_records import RunRecord, night, read_report
from pipelines.store import Store

NUM_LISTED = 30


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """One measure of two runs; JSON-able."""

    measure: str
    """What was measured."""
    first: float | None
    """Of the first run; None: not on record."""
    second: float | None
    """Of the second."""
    ratio: float | None
    """Second to first; None where there is none."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the action that the first word names; returns its exit code."""
    return dispatch("runs", ACTIONS, argv)


def _list(argv: Sequence[str]) -> int:
    parser = _parser("list", "The last runs of a store, the newest last.")
    parser.add_argument("--last", type=int, default=NUM_LISTED, metavar="N", help="so many of them")
    parser.add_argument("--page", metavar="FILE", help="an HTML page with a plot over nights, too")
    options = parser.parse_options(argv)
    if options.last < 1:
        raise ValueError(f"--last {options.last}: expected at least 1")
    store = Store(options.store)
    history = read_history(store, num_last=options.last)
    records = [
        {"run_id": name, "error": redacted(str(found))}
        if isinstance(found, StoreError)
        else _record(found)
        for name, found in history
    ]
    lines = [
        f"{name}  {redacted(str(found))}" if isinstance(found, StoreError) else _line(found)
        for name, found in history
    ]
    if options.page:
        # matplotlib, for which lists need not wait
        from pipelines.runs.runs_page import render_runs_page

        page = render_runs_page(readable(history), store_uri=public_uri(options.store))
        Path(options.page).write_text(page, encoding="utf-8")
        lines.append(f"page: {options.page}")
    text = (
        "\n".join([HEAD, *lines])
        if history
        else f"store {public_uri(store.uri)} has no run on record"
    )
    print_result(records, as_json=options.json, text=text)
    return 0


def _show(argv: Sequence[str]) -> int:
    parser = _parser("show", "One run, with its stages.")
    parser.add_argument("run", nargs="?", help="its name, or how that begins; the last if left out")
    options = parser.parse_options(argv)
    store = Store(options.store)
    record = find_run(store, options.run)
    report = read_report(store, record.run_id)
    lines = [HEAD, _line(record), f"  began    {record.started_at}, last heard of {record.seen_at}"]
    if record.command:
        lines.append(f"  driver   clipmill {record.command} on {record.node}, {_version(record)}")
    if record.error:
        lines.append(f"  error    {record.error}")
    numbers = record.numbers
    if numbers is not None:
        lines += [f"  node     {node}" for node in numbers.nodes]
        lines.append(
            f"  encoders {numbers.num_encoders} by {numbers.backend}, images decoded by "
            f"{numbers.decoder}; GPU-seconds {_number(numbers.gpu_seconds)}"
        )
        lines += [f"  slow     {numbers.slow}"] if numbers.slow else []
    if report is not None:
        lines += [
            f"  {stage.stage:<8} {stage.num_rows:>12,} rows {stage.busy_seconds:>10,.1f} busy s "
            f"{stage.workers:>5} workers {stage.busy_share:>5.0%} {stage.rows_per_second:>12,.0f} "
            "rows/s alone"
            for stage in report.stages
        ]
        lines += [f"  reject   {num:>12,} {name}" for name, num in report.rejects_by_reason.items()]
        lines += [f"  {report.bottleneck}", f"  report   {store.full_path(_page_path(record))}"]
    found = {"record": _record(record), "report": report}
    print_result(found, as_json=options.json, text="\n".join(lines))
    return 0


def _compare(argv: Sequence[str]) -> int:
    parser = _parser("compare", "Two runs side by side, with what the second is of the first.")
    parser.add_argument(
        "first", nargs="?", help="a run's name, or how that begins; the last but one if left out"
    )
    parser.add_argument("second", nargs="?", help="another one; the last if left out")
    options = parser.parse_options(argv)
    store = Store(options.store)
    second = find_run(store, options.second)
    first = find_run(store, options.first) if options.first else run_before(store, second)
    compared = compare(store, first, second)
    lines = [
        f"{'':<26} {night(first):>20} {night(second):>20}",
        *(
            f"{what:<26} {of_first:>20} {of_second:>20}"
            + ("" if of_first == of_second else "   other")
            for what, of_first, of_second in _texts(first, second)
        ),
        *(
            f"{entry.measure:<26} {_number(entry.first):>20} {_number(entry.second):>20} "
            f"{'' if entry.ratio is None else f'x {entry.ratio:.2f}':>7}"
            for entry in compared
        ),
    ]
    found = {"first": _record(first), "second": _record(second), "compared": compared}
    print_result(found, as_json=options.json, text="\n".join(lines))
    return 0


def compare(store: Store, first: RunRecord, second: RunRecord) -> list[Comparison]:
    """All that is measured of both runs, their stages too; StoreError."""
    of_runs = [_measures(store, record) for record in (first, second)]
    compared = []
    for measure in dict.fromkeys([*of_runs[0], *of_runs[1]]):
        before, after = (measures.get(measure) for measures in of_runs)
        ratio = after / before if before and after is not None else None
        compared.append(Comparison(measure=measure, first=before, second=after, ratio=ratio))
    return compared


def _measures(store: Store, record: RunRecord) -> dict[str, float | None]:
    numbers = record.numbers
    if numbers is None:
        return {"rows encoded": record.num_encoded}
    report = read_report(store, record.run_id)
    return {
        "rows encoded": record.num_encoded,
        "rows embedded": numbers.num_embedded,
        "rows copied": numbers.num_copied,
        "rows rejected": numbers.num_rejected,
        "seconds of the stages": numbers.seconds,
        "rows/s": numbers.rows_per_second,
        "rows/s from first batch on": numbers.steady_rows_per_second,
        "encoders": numbers.num_encoders,
        "GPUs": numbers.num_gpus,
        "GPU-seconds": numbers.gpu_seconds,
        "GPU-s per million rows": numbers.gpu_seconds_per_million,
    } | {
        f"{stage.stage} alone, rows/s": stage.rows_per_second
        for stage in (report.stages if report else [])
    }


def _texts(first: RunRecord, second: RunRecord) -> list[tuple[str, str, str]]:
    """What of both is told in words: (what, of the first, of the second)."""
    pairs = [(record, record.numbers) for record in (first, second)]
    rows = {
        "run": [record.run_id for record, _ in pairs],
        "status": [record.status for record, _ in pairs],
        "code": [record.code_version or "-" for record, _ in pairs],
        "engine": [numbers.engine_id if numbers else "-" for _, numbers in pairs],
        "backend, decoder": [
            f"{numbers.backend}, {numbers.decoder}" if numbers else "-" for _, numbers in pairs
        ],
        "nodes": [str(len(numbers.nodes)) if numbers else "-" for _, numbers in pairs],
    }
    return [(what, *values) for what, values in rows.items()]  # type: ignore[misc]


def _parser(action: str, description: str) -> CommandParser:
    parser = CommandParser(f"runs {action}", description=description)
    parser.add_argument("--store", required=True, metavar="URI", help="an output folder of embed")
    return parser


def _record(record: RunRecord) -> dict[str, object]:
    numbers = record.numbers
    return {
        "run_id": record.run_id,
        "command": record.command,
        "status": record.status,
        "started_at": record.started_at,
        "seen_at": record.seen_at,
        "node": record.node,
        "code_version": record.code_version,
        "num_encoded": record.num_encoded,
        "error": record.error,
        "snapshot": numbers.snapshot if numbers else record.snapshot,
        "numbers": numbers,
        "rows_per_second": numbers and numbers.rows_per_second,
        "steady_rows_per_second": numbers and numbers.steady_rows_per_second,
        "gpu_seconds": numbers and numbers.gpu_seconds,
        "gpu_seconds_per_million": numbers and numbers.gpu_seconds_per_million,
    }


HEAD = (
    f"{'run':<22} {'night (UTC)':<16} {'status':<9} {'snapshot':>8} {'embedded':>12} "
    f"{'rejects':>8} {'rows/s':>8} {'GPU-s/M':>8}  engine"
)


def _line(record: RunRecord) -> str:
    numbers = record.numbers
    head = f"{record.run_id:<22} {night(record):<16} {record.status:<9} "
    if numbers is None:
        return (
            f"{head}{_number(record.snapshot):>8} {record.num_encoded:>12,} {'-':>8} {'-':>8} "
            f"{'-':>8}  "
            f"{record.error or '-'}"
        )
    return (
        f"{head}{numbers.snapshot:>8} {numbers.num_embedded:>12,} "
        f"{_number(numbers.num_rejected):>8} {_number(numbers.rows_per_second):>8} "
        f"{_number(numbers.gpu_seconds_per_million):>8}  {numbers.engine_id}"
        f"{', slow' if numbers.slow else ''}"
    )


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.1f}" if isinstance(value, float) and value < 100 else f"{value:,.0f}"


def _version(record: RunRecord) -> str:
    return f"Clipmill {record.code_version}"


def _page_path(record: RunRecord) -> str:
    return f"runs/{record.run_id}/report.html"


ACTIONS: Actions = {
    "list": (_list, "the last runs, the newest last; --page plots them over nights"),
    "show": (_show, "one of them, with its stages"),
    "compare": (_compare, "two of them side by side"),
}


if __name__ == "__main__":
    run(main, sys.argv[1:])
