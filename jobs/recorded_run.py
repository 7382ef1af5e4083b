"""Puts a run on record: while it goes on, and with its report when it is over.

Knows nothing of what is in a report. What went well is not called a failure for want of a report.
"""

import logging
import sys
from collections.abc import Callable
from dataclasses import replace

from engine.redaction import public_uri
from jobs.logs import LogContext, event
from jobs.progress import ProgressSink
from pipelines.counts import Counts
from pipelines.embedding import EmbedConfig
from pipelines.errors import StoreError
from pipelines.progress import Progress
from pipelines.runs.report import RunReport
from pipelines.runs.run_history import read_history, readable
from pipelines.runs.run_journal import RunJournal
from pipelines.runs.run_records import ended_status, run_numbers
from pipelines.runs.run_speed import MAX_PAST_RUNS, slow_line
from pipelines.runs.saving import save_report
from pipelines.store import Store

# Enough for MAX_PAST_RUNS that are like, beside others.
NUM_LAST = 3 * MAX_PAST_RUNS
_log = logging.getLogger(__name__)


def recorded_run(store_uri: str, *, command: str) -> RunJournal:
    """The record of a run of this command, to be held open while it goes on; StoreError."""
    return RunJournal(Store(store_uri), command=command)


def say_begun(config: EmbedConfig) -> None:
    """The first event of a run."""
    catalog_uri, store_uri = public_uri(config.catalog.uri), public_uri(config.store_uri)
    fields = {"catalog_uri": catalog_uri, "store_uri": store_uri}
    _log.info("from %s to %s", catalog_uri, store_uri, extra=event("begun", **fields))


def noted(show: ProgressSink, journal: RunJournal) -> Callable[[Counts, Progress], None]:
    """What shows progress and notes it in a run's record."""

    def on_progress(counts: Counts, progress: Progress) -> None:
        journal.note(progress)
        show(counts, progress)

    return on_progress


def close_run(
    report: RunReport, journal: RunJournal, context: LogContext
) -> tuple[RunReport, str | None]:
    """Save a run's report and close its record, comparing it with earlier runs of the store.

    Returns:
        The report, with a line if the run was slower than they, which is an event too; and its
        page's path, or None and a line on stderr why there is none.
    """
    context.snapshot = report.snapshot  # for all events from here on
    report = replace(report, slow=_slow_line(report, journal))
    if report.slow is not None:
        _log.warning("slow: %s", report.slow, extra=event("slow"))
    try:
        journal.finish(report)
        path = save_report(report, store_uri=journal.store.uri)
    except StoreError as error:
        is_so = "is committed; only its" if report.committed else "stays; only this run's"
        print(
            f"clipmill: snapshot {report.snapshot} {is_so} report is missing: {error}",
            file=sys.stderr,
        )
        path = None
    say_ended(report, context)
    return report, path


def _slow_line(report: RunReport, journal: RunJournal) -> str | None:
    """Whether it was slower than earlier runs; nothing if they cannot be read."""
    try:
        past = readable(read_history(journal.store, num_last=NUM_LAST))
    except StoreError as error:
        _log.warning("not compared with earlier runs: %s", error, extra=event("uncompared"))
        return None
    return slow_line(run_numbers(report), past)


def say_ended(report: RunReport, context: LogContext) -> None:
    """The last event of a run that ended well."""
    context.snapshot = report.snapshot
    numbers = run_numbers(report)
    fields = {
        "status": ended_status(report),
        "num_embedded": numbers.num_embedded,
        "num_copied": numbers.num_copied,
        "num_rejected": numbers.num_rejected,
        "seconds": numbers.seconds,
        "rows_per_second": numbers.rows_per_second,
        "gpu_seconds": numbers.gpu_seconds,
        "engine_id": numbers.engine_id,
    }
    _log.info(
        *("snapshot %d %s: %d rows embedded", report.snapshot, fields["status"]),
        numbers.num_embedded,
        extra=event("ended", **fields),
    )
