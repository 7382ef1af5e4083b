"""Reports of an engine's gate: kept under numbers of their own, the last finished one counts."""

from pathlib import Path

import pytest

from engine.errors import EngineError
from engine.gate_reports import add_gate_report, last_gate
from engine.registry import Registry
from tests.engines import FP8_ID, write_engine

FILES = {"report.json": b"{}", "report.html": b"<html>"}


@pytest.fixture(params=["local", "memory"])
def registry(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Registry:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    is_local = request.param == "local"
    registry = Registry(str(tmp_path) if is_local else f"memory://{tmp_path.name}/engines")
    registry.obtain(FP8_ID, lambda directory: write_engine(directory, engine_id=FP8_ID))
    return registry


def test_the_last_report_counts_and_all_are_kept(registry: Registry):
    assert last_gate(registry, FP8_ID) is None
    first = add_gate_report(registry, FP8_ID, passed=True, files=FILES)
    assert last_gate(registry, FP8_ID) == first
    second = add_gate_report(registry, FP8_ID, passed=False, files={"report.json": b"[]"})
    assert last_gate(registry, FP8_ID) == second
    assert (first.path, first.passed) == (f"{FP8_ID}/gates/00000001", True)
    assert (second.path, second.passed) == (f"{FP8_ID}/gates/00000002", False)
    assert {name: registry.root.read(f"{first.path}/{name}") for name in FILES} == FILES
    assert registry.root.read(f"{second.path}/report.json") == b"[]"
    assert registry.find(FP8_ID) is not None


def test_an_unfinished_report_neither_counts_nor_is_changed(registry: Registry):
    first = add_gate_report(registry, FP8_ID, passed=True, files=FILES)
    registry.root.publish(f"{FP8_ID}/gates/00000002/report.json", b"half")
    assert last_gate(registry, FP8_ID) == first
    third = add_gate_report(registry, FP8_ID, passed=True, files=FILES)
    assert third.path == f"{FP8_ID}/gates/00000003"
    assert registry.root.read(f"{FP8_ID}/gates/00000002/report.json") == b"half"


def test_of_two_reports_at_once_each_gets_a_number(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
):
    first = add_gate_report(registry, FP8_ID, passed=True, files=FILES)
    with monkeypatch.context() as patch:
        patch.setattr(registry.root, "names", lambda folder: [])  # looked before the first
        second = add_gate_report(registry, FP8_ID, passed=False, files=FILES)
    assert second.path > first.path
    assert last_gate(registry, FP8_ID) == second


def test_a_report_of_no_engine_is_refused(registry: Registry):
    with pytest.raises(EngineError, match="no engine fp8-gone; run `clipmill engine build`"):
        add_gate_report(registry, "fp8-gone", passed=True, files=FILES)


def test_a_damaged_report_is_no_answer(registry: Registry):
    registry.root.publish(f"{FP8_ID}/gates/00000001/gate.json", b"{")
    with pytest.raises(EngineError, match=r"00000001/gate\.json is damaged .* remove that folder"):
        last_gate(registry, FP8_ID)
