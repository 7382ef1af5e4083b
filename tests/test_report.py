"""Tests of pipelines/runs/report.py."""

import dataclasses
import json

import pytest

from pipelines.counts import Counts, KeyCounts
from pipelines.embedding import EmbedResult
from pipelines.engines import Execution
from pipelines.progress import GPU_STAGES, STAGES, Progress, StageCount
from pipelines.runs.report import ADVICE, bottleneck_line, make_report, stage_reports, summary
from pipelines.snapshots import StoredFile
from tests.stored import ENGINE_ID, make_snapshot

WORKERS = {"read": 8, "decode": 4, "encode": 2, "write": 8}


def progress(*, seconds: float = 10.0, **busy_seconds: float) -> Progress:
    return Progress(
        seconds=seconds,
        stages={
            stage: StageCount(
                num_rows=1000, num_bytes=5000, busy_seconds=busy_seconds.get(stage, 1.0)
            )
            for stage in STAGES
        },
        samples=[(0.0, 0), (10.0, 1000)],
    )


def bottleneck(**busy_seconds: float) -> str:
    return bottleneck_line(stage_reports(progress(**busy_seconds), workers=WORKERS))


def test_shares_and_rates_of_a_stage():
    stages = {
        stage.stage: stage
        for stage in stage_reports(progress(decode=30, encode=18), workers=WORKERS)
    }
    assert list(stages) == list(STAGES)
    decode, encode = stages["decode"], stages["encode"]
    assert decode.busy_share == pytest.approx(30 / (10 * 4))
    assert decode.rows_per_second == pytest.approx(1000 * 4 / 30)
    assert encode.busy_share == pytest.approx(18 / (10 * 2))
    assert encode.rows_per_second == pytest.approx(1000 * 2 / 18)
    assert (encode.num_rows, encode.num_bytes, encode.workers) == (1000, 5000, 2)


def test_where_gpus_decode_the_advice_is_for_gpus():
    counts = {stage: StageCount(num_rows=10, busy_seconds=1) for stage in GPU_STAGES}
    counts["decode"].busy_seconds = 19
    run = Progress(seconds=10, stages=counts)
    reports = stage_reports(run, workers=WORKERS | {"prepare": 8, "decode": 2})
    assert [report.stage for report in reports] == list(GPU_STAGES)
    line = bottleneck_line(reports)
    assert line.startswith("decode-bound: its 2 workers were busy 95%")
    assert line.endswith(ADVICE["decode by gpu"])
    assert "--decode gpu" in ADVICE["decode"]


def test_a_share_is_at_most_one_and_no_time_is_no_share():
    (read, *_) = stage_reports(progress(read=1000), workers=WORKERS)
    assert read.busy_share == 1
    idle = stage_reports(progress(seconds=0, read=0), workers=WORKERS)[0]
    assert (idle.busy_share, idle.rows_per_second) == (0, 0)


@pytest.mark.parametrize("stage", STAGES)
def test_the_busiest_stage_is_the_bottleneck(stage):
    busy = {name: 0.6 * 10 * num for name, num in WORKERS.items()}
    line = bottleneck(**busy | {stage: 0.9 * 10 * WORKERS[stage]})
    assert line.startswith(f"{stage}-bound: its {WORKERS[stage]} workers were busy 90% of the run")
    assert line.endswith(ADVICE[stage])


def test_busiest_is_by_share_not_by_seconds():
    assert bottleneck(encode=15, read=50).startswith("encode-bound")


def test_when_all_wait_the_start_is_the_bottleneck():
    line = bottleneck(encode=9.9)
    assert line.startswith("start-bound: even encode was busy only 50% of the run")
    assert "encode 202" in line
    assert bottleneck(encode=10).startswith("encode-bound")


@pytest.mark.parametrize("spilled_bytes", [0, None])
def test_what_was_spilled_is_said_if_there_was_any(spilled_bytes: int | None):
    reports = stage_reports(progress(), workers=WORKERS)
    line = bottleneck_line(reports)
    assert bottleneck_line(reports, spilled_bytes=spilled_bytes) == line
    assert bottleneck_line(reports, spilled_bytes=3_000 * 2**20) == (
        f"{line}; meanwhile Ray wrote 3,000 MiB from object stores to disk: give them more memory "
        "(`ray start --object-store-memory BYTES`; where the command starts Ray, a larger "
        "/dev/shm), or less to hold (--batch-rows)"
    )


def test_without_stages_there_was_nothing_to_embed():
    assert bottleneck_line([]) == "nothing to embed: no row is new or changed"


def result(*, committed: bool = True) -> EmbedResult:
    files = [
        StoredFile(path="e", kind="embeddings", modality="image", num_rows=90, num_bytes=1),
        StoredFile(path="t", kind="embeddings", modality="text", num_rows=70, num_bytes=1),
        StoredFile(path="u", kind="embeddings", modality="text", num_rows=20, num_bytes=1),
        StoredFile(path="r", kind="rejects", modality="image", num_rows=10, num_bytes=1),
    ]
    return EmbedResult(
        run_id="run",
        created_at="2026-11-24T00:00:00+00:00",
        snapshot=make_snapshot(files, number=3, modalities=("image", "text")),
        committed=committed,
        counts=Counts(
            num_rows=1105,
            num_keys=1100,
            num_due_rows=60,
            keys={
                "image": KeyCounts(
                    num_new=1040,
                    num_changed=9,
                    num_retried=0,
                    num_moved=11,
                    num_unchanged=40,
                    num_staged=0,
                    num_deleted=2,
                    num_twins=0,
                ),
                "text": KeyCounts(
                    num_new=40,
                    num_changed=9,
                    num_retried=1,
                    num_moved=0,
                    num_unchanged=30,
                    num_staged=20,
                    num_deleted=0,
                    num_twins=3,
                ),
            },
        ),
        num_embedded={"image": 50, "text": 40},
        num_copied={"image": 11, "text": 3},
        num_rejected=7,
        rejects_by_reason={"null_image": 9, "empty_text": 1},
        progress=progress(encode=18) if committed else None,
        workers=WORKERS,
        num_gpus=0,
        nodes=("here: 2 CPUs",),
        execution=Execution(backend="onnxruntime", decoder="cpu"),
    )


def test_a_report_has_the_numbers_of_its_run():
    report = make_report(result(), catalog_uri="catalog", store_uri="store")
    assert (report.run_id, report.snapshot, report.committed) == ("run", 3, True)
    assert (report.catalog_uri, report.store_uri) == ("catalog", "store")
    assert (report.checkpoint, report.engine_id, report.backend, report.embedding_dim) == (
        "acme/clip",
        ENGINE_ID,
        "onnxruntime",
        4,
    )
    assert (report.num_catalog_rows, report.num_keys) == (1105, 1100)
    assert report.num_embedded == {"image": 50, "text": 40}
    assert report.num_copied == {"image": 11, "text": 3}
    assert report.num_unchanged == {"image": 40, "text": 50}
    assert report.num_stored == {"image": 90, "text": 90}
    assert report.rejects_by_reason == {"null_image": 9, "empty_text": 1}
    assert (report.num_rejected, report.num_gpus, report.nodes) == (7, 0, ["here: 2 CPUs"])
    assert report.seconds == 10
    assert report.samples == [(0.0, 0), (10.0, 1000)]
    assert report.bottleneck.startswith("encode-bound")


def test_a_run_without_work_has_a_report_without_stages():
    report = make_report(result(committed=False), catalog_uri="catalog", store_uri="store")
    assert (report.seconds, report.stages, report.samples) == (0, [], [])
    assert report.bottleneck.startswith("nothing to embed")


def test_a_report_survives_json():
    report = make_report(result(), catalog_uri="catalog", store_uri="store")
    record = json.loads(json.dumps(dataclasses.asdict(report)))
    assert record["num_stored"] == {"image": 90, "text": 90}
    assert [stage["stage"] for stage in record["stages"]] == list(STAGES)
    assert record["plan"]["image"]["num_moved"] == 11


def test_the_summary_for_a_terminal():
    lines = summary(make_report(result(), catalog_uri="c", store_uri="s")).splitlines()
    assert lines[0] == "snapshot 3 committed: 1,100 keys of 1,105 rows"
    assert lines[1] == f"  engine {ENGINE_ID} by onnxruntime, images decoded by cpu"
    said = [" ".join(line.split()) for line in lines]
    assert said[2] == "image 90 stored: 50 embedded now, 11 copied, 40 rows unchanged"
    assert said[3] == "planned: 1,040 new, 9 changed, 11 moved, 40 unchanged, 2 deleted"
    assert said[5] == (
        "planned: 40 new, 9 changed, 0 moved, 1 retried, 30 unchanged, "
        "20 staged by an unfinished run, 0 deleted"
    )
    assert lines[6].split() == ["reject", "9", "null_image"]
    encode = next(line for line in lines if line.strip().startswith("encode "))
    assert encode.split() == ["encode", "1,000", "18.0", "2", "90%", "111"]
    assert lines[-1].startswith("encode-bound")
    assert summary(make_report(result(committed=False), catalog_uri="c", store_uri="s")).startswith(
        "snapshot 3 unchanged"
    )
