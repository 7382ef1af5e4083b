"""Keeps a run's record while it goes on: that it began, that it still does, how it ended.

Knows nothing of what the run does. A run that is killed leaves a record that says `running` and is
not written any more.
"""

import platform
import threading
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from types import TracebackType

from pipelines.error_lines import error_line
from pipelines.errors import StoreError
from pipelines.lineage import code_version
from pipelines.progress import Progress
from pipelines.runs.report import RunReport
from pipelines.runs.run_ids import RUNS_DIR, new_run_id
from pipelines.runs.run_records import RunRecord, ended_status, publish_record, run_numbers
from pipelines.snapshots import current_snapshot
from pipelines.store import Store

BEAT_SECONDS = 60.0
# By which a process ends that was told to end: by Ctrl-C, or by SIGTERM.
STOPS = (KeyboardInterrupt, SystemExit)


class RunJournal:
    """The record of one run, for the length of a `with` block.

    A block that raises has failed, or was stopped if it raises KeyboardInterrupt or SystemExit;
    what it committed before is on record. One that neither raises nor calls `finish` leaves no
    record: it had nothing to do. That a record cannot be written stops no run, which would stop for
    the same reason by itself; only `finish` says so.
    """

    def __init__(self, store: Store, *, command: str, beat_seconds: float = BEAT_SECONDS) -> None:
        """Name the run; nothing is written yet."""
        now = _now()
        self.store = store
        """That the run writes into."""
        self._beat_seconds = beat_seconds
        self._record = RunRecord(
            run_id=new_run_id(),
            command=command,
            status="running",
            started_at=now,
            seen_at=now,
            node=platform.node(),
            code_version=code_version(),
            num_encoded=0,
        )
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="run journal", daemon=True)
        self._num_encoded = 0

    @property
    def run_id(self) -> str:
        """Names the run."""
        return self._record.run_id

    def note(self, progress: Progress) -> None:
        """Take how far the run is, for the next time that the record is written."""
        self._num_encoded = progress.stages["encode"].num_rows

    def finish(self, report: RunReport) -> None:
        """Put a run on record that ended well; StoreError if it cannot be."""
        self._stop()
        samples = report.samples
        self._num_encoded = samples[-1][1] if samples else 0
        self._record = replace(
            self._as_of_now(), status=ended_status(report), numbers=run_numbers(report)
        )
        publish_record(self.store, self._record)

    def __enter__(self) -> "RunJournal":
        """Put on record that the run has begun."""
        with suppress(StoreError):
            publish_record(self.store, self._record)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Put on record that the run has failed, or remove the record of one without work."""
        self._stop()
        with suppress(StoreError):
            if error is not None and self._record.numbers is None:
                self._record = replace(
                    self._as_of_now(),
                    status="stopped" if isinstance(error, STOPS) else "failed",
                    error=error_line(error),
                    snapshot=self._committed(),
                )
                publish_record(self.store, self._record)
            elif self._record.numbers is None:
                self.store.remove(f"{RUNS_DIR}/{self.run_id}")

    def _committed(self) -> int | None:
        """The snapshot that the run made, though it did not come to its end."""
        with suppress(StoreError):
            current = current_snapshot(self.store)
            if current is not None and current.run_id == self.run_id:
                return current.number
        return None

    def _as_of_now(self) -> RunRecord:
        return replace(self._record, seen_at=_now(), num_encoded=self._num_encoded)

    def _stop(self) -> None:
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    def _beat(self) -> None:
        while not self._stopped.wait(self._beat_seconds):
            # One that is missed does no harm: readers wait for more than one.
            with suppress(StoreError):
                publish_record(self.store, self._as_of_now())


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
