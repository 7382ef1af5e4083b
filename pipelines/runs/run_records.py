"""What a run leaves on record in its store: that it began, whether and how it ended, its numbers.

Knows nothing of who writes it or of how runs are compared.

    STORE/runs/RUN/run.json       from the run's first second on, written anew while it goes on
    STORE/runs/RUN/report.json    see saving.py; runs of earlier versions have only this
"""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Literal

from pipelines.counts import KeyCounts
from pipelines.manifests import from_record, manifest_errors
from pipelines.runs.report import RunReport, StageReport
from pipelines.runs.run_ids import RUNS_DIR
from pipelines.store import Store

_WAY_OUT = "remove its folder, or leave it: no run needs another's record"

# `running` is what a killed run says too; `killed` is what readers make of it. `stopped`: by hand,
# or by whoever told its process to end.
Status = Literal["running", "committed", "unchanged", "failed", "stopped", "killed"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunNumbers:
    """A run that ended well, in numbers; rows are of all modalities."""

    snapshot: int
    """The current one after it."""
    engine_id: str
    """What encoded."""
    backend: str
    """What executed that."""
    decoder: str
    """Where JPEGs were decoded."""
    num_embedded: int
    """Rows embedded."""
    num_copied: int
    """Rows copied from others of the same content."""
    num_rejected: int | None
    """Rows rejected; None: not on record."""
    seconds: float
    """Of the stages, from the first read to the last write."""
    steady_rows: int
    """Rows that left the encoders after the first batch on record, which ends their start."""
    steady_seconds: float
    """From that batch to the end of the stages."""
    num_encoders: int
    """Encode actors; 0 if there was nothing to encode."""
    num_gpus: float | None
    """That these held; 0 on CPUs, None: not on record."""
    nodes: tuple[str, ...]
    """Of the cluster."""
    slow: str | None
    """See `slow_line`."""

    @property
    def rows_per_second(self) -> float | None:
        """Rows embedded in a second of the stages, their start included."""
        return self.num_embedded / self.seconds if self.seconds else None

    @property
    def steady_rows_per_second(self) -> float | None:
        """The same without the start of the encoders."""
        return self.steady_rows / self.steady_seconds if self.steady_seconds else None

    @property
    def gpu_seconds(self) -> float | None:
        """GPUs held by encoders (`gpus_held`) x seconds of the stages, busy or not."""
        return None if self.num_gpus is None else self.num_gpus * self.seconds

    @property
    def gpu_seconds_per_million(self) -> float | None:
        """GPU-seconds for a million embedded rows; None on CPUs."""
        if not self.gpu_seconds or not self.num_embedded:
            return None
        return self.gpu_seconds / self.num_embedded * 1e6


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRecord:
    """One run of a store."""

    run_id: str
    """Its name, by which runs sort in time."""
    command: str
    """`embed` or `nightly`; empty if not on record."""
    status: Status
    """As written; see `pipelines.runs.run_history` for what a reader makes of it."""
    started_at: str
    """UTC, ISO 8601."""
    seen_at: str
    """When it last said that it goes on, or its end."""
    node: str
    """Where its driver runs; empty if not on record."""
    code_version: str
    """Of Clipmill; empty if not on record."""
    num_encoded: int
    """Rows that left the encoders by then."""
    error: str | None = None
    """Why it failed, in one line without secrets."""
    numbers: RunNumbers | None = None
    """Of a run that ended well."""
    snapshot: int | None = None
    """That a run committed before it failed or was stopped; None: none."""


def run_numbers(report: RunReport) -> RunNumbers:
    """What of a report runs are compared by."""
    encoders = [stage.workers for stage in report.stages if stage.stage == "encode"]
    started = next((sample for sample in report.samples if sample[1]), None)
    steady_rows, steady_seconds = 0, 0.0
    if started is not None:
        last = report.samples[-1]
        steady_rows, steady_seconds = last[1] - started[1], last[0] - started[0]
    return RunNumbers(
        snapshot=report.snapshot,
        engine_id=report.engine_id,
        backend=report.backend,
        decoder=report.decoder,
        num_embedded=sum(report.num_embedded.values()),
        num_copied=sum(report.num_copied.values()),
        num_rejected=report.num_rejected,
        seconds=report.seconds,
        steady_rows=steady_rows,
        steady_seconds=steady_seconds,
        num_encoders=encoders[0] if encoders else 0,
        num_gpus=report.num_gpus,
        nodes=tuple(report.nodes),
        slow=report.slow,
    )


def ended_status(report: RunReport) -> Status:
    """Of a run that has a report."""
    return "committed" if report.committed else "unchanged"


def night(record: RunRecord) -> str:
    """When a run began, to the minute, in UTC."""
    return record.started_at[:16].replace("T", " ")


def record_path(run_id: str) -> str:
    """Of a run's record, relative to the store's root."""
    return f"{RUNS_DIR}/{run_id}/run.json"


def report_path(run_id: str) -> str:
    """Of a run's report, relative to the store's root."""
    return f"{RUNS_DIR}/{run_id}/report.json"


def publish_record(store: Store, record: RunRecord) -> None:
    """Write a record in the place of the one before; StoreError."""
    content = json.dumps(dataclasses.asdict(record), indent=1) + "\n"
    store.publish(record_path(record.run_id), content.encode())


def read_record(store: Store, run_id: str) -> RunRecord | None:
    """A run's record, or what its report says where it has none; None if it has neither.

    Raises:
        StoreError: It cannot be read, is damaged, or was written by a newer Clipmill.
    """
    path = record_path(run_id)
    content = store.read_if_there(path)
    if content is not None:
        with manifest_errors(store, path, way_out=_WAY_OUT):
            return _record_from(json.loads(content))
    report = read_report(store, run_id)
    if report is None:
        return None
    return RunRecord(
        run_id=run_id,
        command="",
        status=ended_status(report),
        started_at=report.created_at,
        seen_at=report.created_at,
        node="",
        code_version="",
        num_encoded=report.samples[-1][1] if report.samples else 0,
        numbers=run_numbers(report),
    )


def read_report(store: Store, run_id: str) -> RunReport | None:
    """A run's report; None if it has none; StoreError as of `read_record`."""
    path = report_path(run_id)
    content = store.read_if_there(path)
    if content is None:
        return None
    with manifest_errors(store, path, way_out=_WAY_OUT):
        return _report_from(json.loads(content))


def _record_from(record: dict[str, Any]) -> RunRecord:
    numbers = record["numbers"]
    if numbers is not None:
        numbers = from_record(RunNumbers, {**numbers, "nodes": tuple(numbers["nodes"])})
    return from_record(RunRecord, {**record, "numbers": numbers})


def _report_from(record: dict[str, Any]) -> RunReport:
    return from_record(
        RunReport,
        {
            **record,
            "plan": {name: from_record(KeyCounts, keys) for name, keys in record["plan"].items()},
            "stages": [from_record(StageReport, stage) for stage in record["stages"]],
            "samples": [(seconds, num_rows) for seconds, num_rows in record["samples"]],
        },
    )
