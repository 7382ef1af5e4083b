"""What goes and what stays, on a disk and on an object store, beside running builders."""

import os
import shutil
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from engine import garbage
from engine.garbage import Retention, find_garbage, remove_garbage
from engine.gate_reports import add_gate_report
from engine.promotion import promote, rollback
from engine.publishing.folders import Folder
from engine.publishing.leases import LeaseQueue, LeaseTiming
from engine.registry import Registry, engine_artifact, plan_artifact
from tests.engines import FP32_ID, PLAN_ID, flip_byte, write_engine, write_plan
from tests.object_store import s3_bucket

WEEK = Retention()
NOW = Retention(max_age_days=0, num_promotions=1)


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3_bucket() as uri:
        yield uri


@pytest.fixture
def disk(tmp_path: Path) -> Registry:
    return Registry(str(tmp_path / "engines"))


@pytest.fixture
def remote(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Registry(f"{bucket}/{tmp_path.name}/engines")


@pytest.fixture(params=["disk", "remote"])
def registry(request: pytest.FixtureRequest) -> Registry:
    return request.getfixturevalue(request.param)


@pytest.fixture
def all_is_old(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing on a remote root looks as if somebody were still at it."""
    monkeypatch.setattr(garbage, "BUILDING_SECONDS", 0)


def obtain(registry: Registry, engine_id: str = FP32_ID) -> Path:
    return registry.obtain(
        engine_id, lambda path: write_engine(path, engine_id=engine_id)
    ).directory


def paths(found: list[garbage.Garbage]) -> set[str]:
    return {item.path for item in found}


def removed(registry: Registry, retention: Retention) -> set[str]:
    """What goes, which must be what was announced."""
    announced = find_garbage(registry, retention)
    gone = remove_garbage(registry, retention)
    assert gone == announced
    assert find_garbage(registry, retention) == []
    return paths(gone)


def test_an_empty_registry_has_none(registry: Registry):
    assert find_garbage(registry, NOW) == []


def test_what_is_young_and_whole_stays(registry: Registry, all_is_old: None):
    obtain(registry)
    registry.obtain_plan(FP32_ID, PLAN_ID, write_plan)
    add_gate_report(registry, FP32_ID, passed=True, files={"report.json": b"{}"})
    assert removed(registry, WEEK) <= {f"leases/{FP32_ID}"}
    assert registry.find(FP32_ID) is not None
    plan_artifact(FP32_ID, PLAN_ID).verify(registry.local.directory / FP32_ID / "plans" / PLAN_ID)


def test_an_old_engine_that_nobody_promoted_goes_with_all_it_has(
    registry: Registry, all_is_old: None
):
    obtain(registry)
    registry.obtain_plan(FP32_ID, PLAN_ID, write_plan)
    registry.root.publish("README.md", b"a person's")
    found = find_garbage(registry, NOW)
    if registry.root.is_local:
        assert paths(found) == {FP32_ID}
        assert found[0].num_bytes > len("graph") * 3 + len("plan")
        assert "neither promoted nor kept for a rollback, 0 days old" in found[0].reason
    assert FP32_ID in paths(remove_garbage(registry, NOW))
    remove_garbage(registry, NOW)  # a node's copy goes once the root's is gone
    assert registry.find(FP32_ID) is None
    assert registry.root.names("") == ["README.md"]
    assert registry.local.folders("") == []
    assert find_garbage(registry, NOW) == []


def test_the_age_that_counts_is_in_days(disk: Registry):
    manifest = obtain(disk) / "manifest.json"
    almost = time.time() - 6.9 * 24 * 3600
    os.utime(manifest, (almost, almost))
    assert find_garbage(disk, WEEK) == []
    old = time.time() - 7.1 * 24 * 3600
    os.utime(manifest, (old, old))
    assert removed(disk, WEEK) == {FP32_ID}


def test_promoted_engines_and_those_to_roll_back_to_stay(registry: Registry, all_is_old: None):
    names = [f"fp32-{letter}" for letter in "abcdef"]
    for name in names:
        obtain(registry, name)
    digest = registry.obtain(names[0], write_engine).manifest.checkpoint_digest
    for name in names[:5]:
        promote(registry, name)
    rollback(registry, digest)  # to d; then c and b
    remove_garbage(registry, Retention(max_age_days=0, num_promotions=3))
    assert registry.engine_ids() == ["fp32-b", "fp32-c", "fp32-d", "fp32-e"]
    assert rollback(registry, digest).engine_id == "fp32-c"
    assert rollback(registry, digest).engine_id == "fp32-b"


def test_an_engine_that_is_promoted_meanwhile_stays(
    registry: Registry, all_is_old: None, monkeypatch: pytest.MonkeyPatch
):
    obtain(registry)
    kept_engines = garbage._kept_engines

    def early(*arguments: object) -> set[str]:
        kept = kept_engines(*arguments)
        promote(registry, FP32_ID)
        return kept

    monkeypatch.setattr(garbage, "_kept_engines", early)
    assert FP32_ID not in paths(remove_garbage(registry, NOW))
    assert registry.find(FP32_ID) is not None


def test_damaged_folders_go_and_what_is_promoted_stays_whatever_it_is(disk: Registry):
    for name in ("fp32-a", "fp32-b", "fp32-c"):
        flip_byte(obtain(disk, name) / "image.onnx")
    promote(disk, "fp32-a")
    flip_byte(disk.obtain_plan("fp32-a", PLAN_ID, write_plan) / "image.plan")
    (disk.local.directory / "fp32-b" / "manifest.json").unlink()
    assert removed(disk, WEEK) == {"fp32-b", "fp32-c", f"fp32-a/plans/{PLAN_ID}"}
    assert disk.local.folders("") == ["fp32-a", "promotions"]


@pytest.mark.parametrize("record", [b"{", b"[]", b'{"files": {"../x": "00"}}'])
def test_malformed_records_on_a_root_stop_nothing(
    remote: Registry, all_is_old: None, record: bytes
):
    for name in ("fp32-a", "fp32-b", "fp32-c"):
        obtain(remote, name)
        remote.obtain_plan(name, PLAN_ID, write_plan)
    promote(remote, "fp32-a")
    for path in (f"fp32-a/plans/{PLAN_ID}/plan.json", "fp32-b/manifest.json"):
        remote.root.publish(path, record)
    remote.root.publish("fp32-c/manifest.json", remote.root.read("fp32-a/manifest.json"))
    found = find_garbage(remote, WEEK)
    on_root = {item.path for item in found if item.place == "root" and "leases" not in item.path}
    assert on_root == {f"fp32-a/plans/{PLAN_ID}", "fp32-b", "fp32-c"}
    remote.root.publish("fp32-a/manifest.json", record)
    remove_garbage(remote, WEEK)
    assert remote.engine_ids() == ["fp32-a"]
    assert remote.plan_ids("fp32-a") == []


def test_ages_are_by_the_clock_of_the_root(registry: Registry, monkeypatch: pytest.MonkeyPatch):
    obtain(registry)
    now = registry.root.current_time()
    monkeypatch.setattr(Folder, "current_time", lambda _: now + timedelta(days=6.9))
    assert FP32_ID not in paths(find_garbage(registry, WEEK))
    monkeypatch.setattr(Folder, "current_time", lambda _: now + timedelta(days=7.1))
    assert FP32_ID in paths(find_garbage(registry, WEEK))


def test_what_killed_builders_left_on_a_node_goes(registry: Registry):
    obtain(registry)
    leftover = registry.local.directory / ".building" / FP32_ID / "tmp123"
    leftover.mkdir()
    (leftover / "image.onnx").write_bytes(b"half")
    found = find_garbage(registry, WEEK)
    assert [(item.path, item.num_bytes) for item in found] == [(f".building/{FP32_ID}/tmp123", 4)]
    with registry.local.lock(engine_artifact(FP32_ID)):  # no leftover: somebody is at it
        assert remove_garbage(registry, WEEK) == []
    assert removed(registry, WEEK) == {f".building/{FP32_ID}/tmp123"}
    assert not leftover.exists()


def test_nothing_goes_from_under_a_builder(disk: Registry):
    obtain(disk)
    with disk.local.lock(plan_artifact(FP32_ID, PLAN_ID)):
        assert find_garbage(disk, NOW) == []
    assert paths(find_garbage(disk, NOW)) == {FP32_ID}


def test_nothing_goes_from_under_a_builder_on_another_node(remote: Registry):
    obtain(remote)
    lease = LeaseQueue(remote.root, f"{FP32_ID}/plans/{PLAN_ID}", timing=LeaseTiming()).take()
    assert lease is not None
    remote.root.publish(f"{FP32_ID}/plans/{PLAN_ID}/files/image.plan", b"half")
    remote.root.publish("fp32-half/files/image.onnx", b"half")
    assert find_garbage(remote, NOW) == []


def test_what_builders_left_on_a_root_goes(remote: Registry, all_is_old: None):
    obtain(remote)
    half = [
        f"{FP32_ID}/files/0123-image.onnx",
        f"{FP32_ID}/plans/half/files/image.plan",
        "fp32-half/files/image.onnx",
    ]
    for path in half:
        remote.root.publish(path, b"half")
    gone = removed(remote, WEEK)
    assert gone == {half[0], f"{FP32_ID}/plans/half", "fp32-half", f"leases/{FP32_ID}"}
    shutil.rmtree(remote.local.directory)
    assert remote.find(FP32_ID) is not None
    assert remote.root.names("") == [FP32_ID]


def test_the_record_goes_first(remote: Registry, all_is_old: None, monkeypatch: pytest.MonkeyPatch):
    obtain(remote)
    order: list[str] = []
    remove = Folder.remove

    def noted(folder: Folder, relative: str) -> None:
        order.append(relative)
        remove(folder, relative)

    monkeypatch.setattr(Folder, "remove", noted)
    remove_garbage(remote, NOW)
    assert order.index(f"{FP32_ID}/manifest.json") < order.index(FP32_ID)


def test_bounds_are_checked():
    with pytest.raises(ValueError, match="max_age_days=-1: expected at least 0"):
        Retention(max_age_days=-1)
    with pytest.raises(ValueError, match="num_promotions=0: expected at least 1"):
        Retention(num_promotions=0)
