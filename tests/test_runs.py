"""Tests of pipelines/runs/saving.py."""

import dataclasses
import json

import pytest

from pipelines.runs.report import RunReport
from pipelines.runs.saving import save_report
from pipelines.store import Store

REPORT = RunReport(
    run_id="20260301T101502-4fe2a1",
    created_at="2026-03-01T10:23:41+00:00",
    catalog_uri="catalog",
    store_uri="store",
    checkpoint="acme/clip",
    engine_id="9b1cf2e07a44d1c8",
    backend="onnxruntime",
    decoder="cpu",
    embedding_dim=512,
    snapshot=7,
    committed=True,
    num_catalog_rows=12,
    num_keys=11,
    num_embedded={"image": 5},
    num_copied={"image": 0},
    num_unchanged={"image": 6},
    plan={},
    num_stored={"image": 10},
    rejects_by_reason={"null_image": 1},
    seconds=0.0,
    stages=[],
    samples=[],
    bottleneck="nothing to embed: no row is new or changed",
)


@pytest.mark.parametrize("scheme", ["", "memory:/"])
def test_a_run_leaves_its_numbers_and_its_page(tmp_path, scheme):
    report = dataclasses.replace(REPORT, store_uri=f"{scheme}{tmp_path}")
    store = Store(report.store_uri)
    path = save_report(report, store_uri=report.store_uri)
    assert path == store.full_path("runs/20260301T101502-4fe2a1/report.html")
    folder = "runs/20260301T101502-4fe2a1"
    assert store.list(folder, suffix="") == [f"{folder}/report.html", f"{folder}/report.json"]
    assert json.loads(store.read(f"{folder}/report.json")) == dataclasses.asdict(report)
    page = store.read(f"{folder}/report.html").decode()
    assert page.lower().startswith("<!doctype html>")
    assert report.run_id in page


def test_the_path_of_a_local_page_can_be_opened(tmp_path):
    with open(save_report(REPORT, store_uri=str(tmp_path))) as page:
        assert "acme/clip" in page.read()


def test_each_run_has_a_folder_of_its_own(tmp_path):
    first = save_report(REPORT, store_uri=str(tmp_path))
    second = save_report(dataclasses.replace(REPORT, run_id="next"), store_uri=str(tmp_path))
    assert first != second
    assert len(list((tmp_path / "runs").iterdir())) == 2
