"""What is said of engines: of a root on a disk and of one in memory the same."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from engine.gate_reports import add_gate_report
from engine.inventory import engine_entry, list_engines, plan_records
from engine.plans.plan import BULK, PlanKey, PlanRecord, TowerPlan
from engine.promotion import promote
from engine.registry import Registry
from tests.engines import FP8_ID, FP32_ID, PLAN_ID, write_engine, write_plan


@pytest.fixture(params=["local", "memory"])
def registry(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Registry:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    is_local = request.param == "local"
    return Registry(str(tmp_path) if is_local else f"memory://{tmp_path.name}/engines")


def test_an_empty_registry_lists_nothing(registry: Registry):
    assert list_engines(registry) == []
    assert engine_entry(registry, FP32_ID) is None


def test_engines_are_listed_with_all_that_belongs_to_them(registry: Registry):
    for engine_id in (FP32_ID, FP8_ID):
        registry.obtain(engine_id, lambda path, name=engine_id: write_engine(path, engine_id=name))
    registry.obtain_plan(FP8_ID, PLAN_ID, write_plan)
    add_gate_report(registry, FP8_ID, passed=True, files={"report.json": b"{}"})
    promote(registry, FP8_ID)
    registry.root.publish("fp8-unfinished/files/image.onnx", b"half")
    registry.root.publish(f"{FP8_ID}/plans/unfinished/files/image.plan", b"half")
    registry.root.publish("README.md", b"a person's")
    fp32, fp8 = sorted(list_engines(registry), key=lambda entry: entry.engine_id)
    assert (fp32.engine_id, fp8.engine_id) == (FP32_ID, FP8_ID)
    assert (fp32.is_promoted, fp32.gate_passed, fp32.plan_ids) == (False, None, ())
    assert (fp8.is_promoted, fp8.gate_passed, fp8.plan_ids) == (True, True, (PLAN_ID,))
    assert fp8 == engine_entry(registry, FP8_ID)
    assert fp32.num_bytes == len("graph") * 3 + len(registry.root.read(f"{FP32_ID}/manifest.json"))
    assert fp8.num_bytes > fp32.num_bytes
    age = datetime.now(UTC) - datetime.fromisoformat(fp8.published_at)
    assert age < timedelta(minutes=1)


def test_plans_are_read_and_those_that_cannot_be_are_named(registry: Registry):
    registry.obtain(FP8_ID, lambda path: write_engine(path, engine_id=FP8_ID))
    key = PlanKey(flavour="tensorrt", version="11.4", architecture="sm_90", profile=BULK)
    image = TowerPlan(
        min_shape=(256, 2, 2, 3),
        max_shape=(256, 2, 2, 3),
        plan_bytes=4,
        activation_bytes=None,
        num_fp8_products=7,
        fallbacks=("/fc1/MatMul",),
    )
    whole = PlanRecord(
        engine_id=FP8_ID, key=key, image=image, text=None, build_seconds=1.0, files={}
    )
    registry.obtain_plan(FP8_ID, key.plan_id, whole.write)
    registry.obtain_plan(FP8_ID, PLAN_ID, write_plan)  # its record says nothing but the files
    registry.root.publish(f"{FP8_ID}/plans/unfinished/files/image.plan", b"half")
    assert plan_records(registry, FP8_ID) == {key.plan_id: whole, PLAN_ID: None}
    assert plan_records(registry, FP32_ID) == {}
