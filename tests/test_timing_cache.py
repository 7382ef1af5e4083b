"""Timing caches: what a build finds, and what it leaves."""

import errno
import os
from pathlib import Path

import pytest
import tensorrt_rtx_bindings as rtx

from engine.errors import PlanError
from engine.plans.plan import BULK, PlanKey
from engine.plans.timing_cache import TimingCache
from tests.bindings import misuses
from tests.fake_builder import FakeConfig

KEY = PlanKey(flavour="tensorrt", version="11.4.0.106", architecture="sm_90", profile=BULK)
NAME = "tensorrt-11.4.0.106-sm_90.timing"


def build(directory: Path) -> None:
    cache, config = TimingCache(directory, KEY), FakeConfig()
    cache.attach(config)
    assert config.cache is not None
    config.cache.known += b"timed,"
    cache.publish(config)


def test_builds_add_to_it(tmp_path: Path) -> None:
    for _ in range(3):
        build(tmp_path / "new" / "folder")
    (path,) = (tmp_path / "new" / "folder").iterdir()
    assert path.name == NAME
    assert path.read_bytes() == b"timed," * 3
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("content", [b"malformed", b"of another card"])
def test_what_tensorrt_refuses_counts_as_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / NAME).write_bytes(content)
    build(tmp_path)
    assert (tmp_path / NAME).read_bytes() == b"timed,"


def test_of_two_builds_at_once_the_last_stays(tmp_path: Path) -> None:
    first, second = (TimingCache(tmp_path, KEY) for _ in range(2))
    configs = FakeConfig(), FakeConfig()
    for cache, config, known in zip((first, second), configs, (b"one", b"two"), strict=True):
        cache.attach(config)
        assert config.cache is not None
        config.cache.known += known
    first.publish(configs[0])
    second.publish(configs[1])
    (path,) = tmp_path.iterdir()
    assert path.read_bytes() == b"two"


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(PlanError, match=r"timing cache .* cannot be kept \(.*name a folder that"):
        TimingCache(tmp_path / "file", KEY)


def test_a_folder_that_is_gone(tmp_path: Path) -> None:
    cache, config = TimingCache(tmp_path / "folder", KEY), FakeConfig()
    cache.attach(config)
    (tmp_path / "folder").rmdir()
    with pytest.raises(PlanError, match="cannot be kept"):
        cache.publish(config)


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def replace(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(PlanError, match=r"cannot be kept \(No space left on device\)"):
        build(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_bindings_have_what_is_used() -> None:
    used, wrong = misuses(TimingCache, {"config": rtx.IBuilderConfig})
    assert not wrong
    assert used == {"create_timing_cache", "set_timing_cache", "get_timing_cache"}
