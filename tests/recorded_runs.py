"""Records of runs, for tests: what a run of so many rows, so fast, would leave."""

from dataclasses import replace
from typing import Any

from pipelines.runs.report import RunReport, StageReport
from pipelines.runs.run_records import RunRecord, run_numbers

# Of a run of 100 s: encoders start in the first 20, then 6,000 rows a second leave them.
REPORT = RunReport(
    run_id="20260301T031500-000001",
    created_at="2026-03-01T03:20:00+00:00",
    catalog_uri="catalog",
    store_uri="store",
    checkpoint="acme/clip",
    engine_id="fp8-0011223344556677",
    backend="tensorrt",
    decoder="gpu",
    embedding_dim=512,
    snapshot=7,
    committed=True,
    num_catalog_rows=600_000,
    num_keys=600_000,
    num_embedded={"image": 480_000, "text": 0},
    num_copied={"image": 15, "text": 5},
    num_unchanged={"image": 0, "text": 0},
    plan={},
    num_stored={"image": 480_000, "text": 0},
    rejects_by_reason={"null_image": 3, "truncated_image": 9},
    seconds=100.0,
    stages=[
        StageReport(
            stage="encode",
            num_rows=486_000,
            num_bytes=0,
            busy_seconds=150.0,
            core_seconds=0.0,
            workers=2,
            busy_share=0.75,
            rows_per_second=6_480.0,
        )
    ],
    samples=[(0.0, 0), (20.0, 6_000), (60.0, 246_000), (100.0, 486_000)],
    bottleneck="encode-bound: its 2 workers were busy 75% of the run",
    num_rejected=9,
    num_gpus=2.0,
    nodes=["gpu-1: 16 CPUs, 2 GPUs (H200)"],
)


def record(number: int = 1, *, speed: float = 6_000.0, **changes: Any) -> RunRecord:
    """A run that ended well, of which after its start so many rows a second were encoded."""
    numbers = replace(run_numbers(REPORT), steady_rows=round(80 * speed))
    return RunRecord(
        run_id=f"202603{number:02d}T031500-00000{number % 10}",
        command="nightly",
        status="committed",
        started_at=f"2026-03-{number:02d}T03:15:00+00:00",
        seen_at=f"2026-03-{number:02d}T03:20:00+00:00",
        node="head",
        code_version="0.1.0",
        num_encoded=486_000,
        numbers=replace(numbers, **changes),
    )
