"""Tests of pipelines/runs/run_records.py."""

import dataclasses
import json

import pytest

from pipelines.errors import StoreError
from pipelines.runs.run_ids import new_run_id
from pipelines.runs.run_records import (
    publish_record,
    read_record,
    read_report,
    record_path,
    report_path,
    run_numbers,
)
from pipelines.runs.saving import save_report
from pipelines.store import Store
from tests.recorded_runs import REPORT, record


def test_names_sort_in_time_and_are_never_alike():
    names = [new_run_id() for _ in range(3)]
    assert len(set(names)) == 3
    assert [name[:15] for name in names] == sorted(name[:15] for name in names)


def test_what_a_run_cost():
    numbers = run_numbers(REPORT)
    assert (numbers.num_embedded, numbers.num_copied, numbers.num_rejected) == (480_000, 20, 9)
    assert numbers.rows_per_second == 4_800
    assert (numbers.steady_rows, numbers.steady_seconds) == (480_000, 80)
    assert numbers.steady_rows_per_second == 6_000
    assert numbers.gpu_seconds == 200
    assert numbers.gpu_seconds_per_million == pytest.approx(416.667, abs=0.001)
    assert numbers.num_encoders == 2


def test_on_cpus_no_gpu_second_was_held():
    numbers = run_numbers(dataclasses.replace(REPORT, num_gpus=0.0))
    assert (numbers.gpu_seconds, numbers.gpu_seconds_per_million) == (0, None)


def test_a_run_without_work_has_no_speed():
    idle = dataclasses.replace(
        REPORT, seconds=0.0, stages=[], samples=[], num_embedded={"image": 0}
    )
    numbers = run_numbers(idle)
    assert (numbers.rows_per_second, numbers.steady_rows_per_second) == (None, None)
    assert (numbers.gpu_seconds, numbers.gpu_seconds_per_million) == (0, None)
    assert numbers.num_encoders == 0


@pytest.mark.parametrize("scheme", ["", "memory:/"])
def test_what_was_written_is_read(tmp_path, scheme):
    store = Store(f"{scheme}{tmp_path}")
    written = record()
    publish_record(store, written)
    assert read_record(store, written.run_id) == written
    failed = dataclasses.replace(
        written, status="failed", numbers=None, error="StoreError: full", snapshot=8
    )
    publish_record(store, failed)
    assert read_record(store, written.run_id) == failed
    assert read_record(store, "another") is None
    # As it was written before what failed could have a snapshot.
    content = json.loads(store.read(record_path(written.run_id)))
    del content["snapshot"]
    store.publish(record_path(written.run_id), json.dumps(content).encode())
    assert read_record(store, written.run_id) == dataclasses.replace(failed, snapshot=None)


def test_of_runs_of_before_there_is_the_report(tmp_path):
    store = Store(str(tmp_path))
    save_report(REPORT, store_uri=str(tmp_path))
    path = report_path(REPORT.run_id)
    old = json.loads(store.read(path))
    for name in ("num_rejected", "num_gpus", "nodes", "slow"):
        del old[name]
    store.publish(path, json.dumps(old).encode())
    found = read_record(store, REPORT.run_id)
    assert (found.status, found.started_at) == ("committed", REPORT.created_at)
    assert found.num_encoded == 486_000
    assert (found.numbers.num_rejected, found.numbers.gpu_seconds) == (None, None)
    assert found.numbers.rows_per_second == 4_800
    report = read_report(store, REPORT.run_id)
    assert report.stages == REPORT.stages
    assert report.samples == REPORT.samples


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "is damaged"),
        (b"[]", "is damaged"),
        (b'{"numbers": null, "run_id": "x"}', "is damaged"),
        (b'{"numbers": null, "color": "red"}', "written by a newer Clipmill"),
    ],
)
def test_a_damaged_record_says_so(tmp_path, content, said):
    store = Store(str(tmp_path))
    store.publish(record_path("run"), content)
    with pytest.raises(StoreError, match=said):
        read_record(store, "run")
