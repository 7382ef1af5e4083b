"""Tests of jobs/checks: each thing there, missing and wrong, with what mends it."""

import os
import resource
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine.backends.choice import NO_GPU, Machine
from engine.device import Device
from engine.errors import DeviceError
from engine.plans.runtimes import Library, MessageLog
from jobs.checks import gpu, places
from jobs.checks.machine import (
    GIB,
    disk_check,
    machine_checks,
    memory_check,
    open_files_check,
    shm_check,
)
from jobs.checks.packages import (
    constrained_versions,
    constraints_check,
    missing_check,
    packages_check,
    python_check,
    requirements,
    wanted_python,
)
from jobs.checks.places import catalog_check, engines_check, store_check
from pipelines.catalog import CatalogConfig
from pipelines.store import Store
from tests.catalogs import write_rows
from tests.fake_gpu import FakeCuda
from tests.stored import commit_vectors

INSTALLED = {"numpy": "2.1.0", "torch": "2.13.0+cpu", "ray": "2.50.0"}
WANTED = ["numpy>=2.0", "ray[data,serve]>=2.60", "torch>=2.9", "faiss-cpu>=1.12"]


def test_what_is_not_installed_is_named_with_the_command():
    check = missing_check(WANTED, installed=INSTALLED.get)
    assert check is not None
    assert (check.verdict, check.found, check.stops) == ("missing", "faiss-cpu", True)
    assert check.mend == "pip install -c constraints.txt 'faiss-cpu>=1.12'"
    assert missing_check(WANTED[:3], installed=INSTALLED.get) is None


def test_what_is_too_old_is_named_with_the_command():
    check = packages_check(WANTED, installed=INSTALLED.get)
    assert (check.verdict, check.found) == ("wrong", "ray 2.50.0, >=2.60 is needed")
    assert check.mend == "pip install -c constraints.txt 'ray[data,serve]>=2.60'"
    assert packages_check(["numpy>=2.0"], installed=INSTALLED.get).verdict == "ok"


def test_other_versions_than_tested_are_told_but_right():
    tested = {"NumPy": "2.2.0", "torch": "2.13.0", "pandas": "3.0.0"}
    check = constraints_check(WANTED, tested, installed=INSTALLED.get)
    assert check.verdict == "ok"
    assert "1 of 2 packages" in check.found
    assert "numpy 2.1.0 (2.2.0)" in check.found
    assert check.mend == "pip install -c constraints.txt ."
    same = constraints_check(WANTED, {"torch": "2.13.0"}, installed=INSTALLED.get)
    assert (same.found, same.mend) == ("1 packages as in constraints.txt", "")
    assert "no constraints.txt" in constraints_check(WANTED, {}, installed=INSTALLED.get).found


@pytest.mark.parametrize(("version", "verdict"), [("3.11.0", "ok"), ("3.14.1", "wrong")])
def test_python(version, verdict):
    assert python_check(wanted_python(), version=version).verdict == verdict


def test_the_project_says_what_it_wants():
    assert any(line.startswith("faiss-cpu>=") for line in requirements())
    assert "packaging" in constrained_versions()
    assert missing_check(requirements()) is None


def test_memory_disk_and_files():
    assert memory_check(2, free_bytes=3 * GIB, total_bytes=4 * GIB).verdict == "ok"
    assert memory_check(2, free_bytes=1 * GIB, total_bytes=4 * GIB).verdict == "wrong"
    disk = disk_check("/x", free_bytes=50 * GIB, total_bytes=100 * GIB)
    assert (disk.verdict, disk.found) == ("ok", "50.0 of 100.0 GiB free in /x")
    full = disk_check("/x", free_bytes=4 * GIB, total_bytes=100 * GIB)
    assert (full.verdict, full.stops, "95% full" in full.found) == ("wrong", False, True)
    short = disk_check("/x", free_bytes=GIB // 2, total_bytes=1 * GIB)
    assert (short.verdict, short.stops) == ("wrong", True)
    assert shm_check(4, free_bytes=2 * GIB, memory_bytes=4 * GIB).verdict == "ok"
    shm = shm_check(16, free_bytes=64 * 2**20, memory_bytes=64 * GIB)
    assert (shm.verdict, shm.stops) == ("wrong", False)
    assert "--shm-size=8g" in shm.mend
    # A pod's is as large as its node's memory, of which it may take less.
    shm = shm_check(16, free_bytes=64 * GIB, memory_bytes=GIB // 2)
    assert (shm.verdict, shm.mend) == ("wrong", "see memory")
    assert "but 0.5 GiB of memory" in shm.found
    assert open_files_check(1024).verdict == "wrong"
    assert open_files_check(65_536).verdict == "ok"
    assert open_files_check(resource.RLIM_INFINITY).found == "no limit"


def test_this_machine_has_them_all():
    names = [check.name for check in machine_checks()]
    assert names[:3] == ["memory", "disk", "open files"]


def machine(architecture: str = "sm_90", **changes: Any) -> Machine:
    return Machine(
        **{"architecture": architecture, "tensorrt_fault": None, "has_torch": True, **changes}
    )


@pytest.mark.parametrize(
    ("here", "verdict", "found", "stops"),
    [
        (NO_GPU, "ok", "fp32 by onnxruntime, fp16 by onnxruntime, fp8 by onnxruntime", False),
        (machine(), "ok", "fp32 by onnxruntime, fp16 by tensorrt, fp8 by tensorrt", False),
        (
            machine(tensorrt_fault="no TensorRT here"),
            *("ok", "fp32 by onnxruntime, fp16 by torch, fp8 by torch", False),
        ),
        (
            machine("sm_80"),
            *("wrong", "fp32 by onnxruntime, fp16 by tensorrt; but this GPU (sm_80) has", False),
        ),
        (
            machine("sm_86", tensorrt_fault="no TensorRT here"),
            *("wrong", "fp32 by onnxruntime, fp16 by torch; but this GPU (sm_86)", False),
        ),
        (machine("sm_89"), "ok", "fp32 by onnxruntime, fp16 by tensorrt, fp8 by tensorrt", False),
        (machine("sm_120"), "ok", "fp32 by onnxruntime, fp16 by tensorrt, fp8 by tensorrt", False),
        (
            machine(tensorrt_fault="no TensorRT here", has_torch=False),
            *("wrong", "fp32 by onnxruntime; but there is a GPU (sm_90), but nothing", True),
        ),
    ],
)
def test_which_backends_run(here, verdict, found, stops):
    check = gpu.backends_check(here)
    order = sorted(check.found.split("; but")[0].split(", "))
    assert check.verdict == verdict
    assert sorted(found.split("; but")[0].split(", ")) == order
    assert check.stops == stops
    if "; but" in found:
        assert found.split("; but")[1] in check.found
        assert check.mend


def test_what_fp8_takes_is_said():
    found = gpu.backends_check(machine("sm_86")).found
    assert "this GPU (sm_86) has no FP8" in found
    assert found.endswith("(FP8 begins with sm_89)")
    nothing = machine("sm_86", tensorrt_fault="no TensorRT here", has_torch=False)
    assert "begins with" not in gpu.backends_check(nothing).found


def library(flavour: str) -> Library:
    return Library(flavour=flavour, version="10.13.3", api=None, log=MessageLog(), logger=None)


@pytest.mark.parametrize(
    ("here", "installed", "verdict", "found"),
    [
        (machine(), library("tensorrt"), "ok", "tensorrt 10.13.3"),
        (NO_GPU, library("tensorrt_rtx"), "ok", "compiles plans for other machines"),
        (NO_GPU, library("tensorrt"), "ok", "has no GPU to run on"),
        (NO_GPU, DeviceError("no TensorRT here: x"), "ok", "none is needed"),
        (machine(), DeviceError("no TensorRT here: x"), "missing", "no TensorRT here: x"),
        (machine(), DeviceError("tensorrt is installed, but not whole"), "wrong", "not whole"),
        (
            machine(tensorrt_fault="it does not serve sm_90"),
            *(library("tensorrt_rtx"), "wrong", "it does not serve sm_90"),
        ),
    ],
)
def test_tensorrt(monkeypatch: pytest.MonkeyPatch, here, installed, verdict, found):
    def asked() -> Library:
        if isinstance(installed, DeviceError):
            raise installed
        return installed

    monkeypatch.setattr(gpu, "installed_library", asked)
    check = gpu.tensorrt_check(here)
    assert check.verdict == verdict
    assert found in check.found
    assert bool(check.mend) == (verdict != "ok")


def test_cards_and_their_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    version = tmp_path / "version"
    version.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n"
    )
    assert gpu.driver_version(version) == "580.65.06"
    assert gpu.driver_version(tmp_path / "none") == "of unknown version"
    monkeypatch.setattr(gpu, "driver_version", lambda: "580.65.06")
    found = gpu.cards_check(Device(FakeCuda(total_bytes=141 * GIB))).found
    assert found == (
        "NVIDIA H200 (sm_90, 141 GiB), of the first 141 GiB free; driver 580.65.06, for CUDA up to "
        "13.1"
    )


def test_a_gpu_that_nothing_can_use_stops(monkeypatch: pytest.MonkeyPatch):
    def fail() -> Machine:
        raise DeviceError("CUDA for Python is missing (cuda): pip install 'clipmill[gpu]'")

    monkeypatch.setattr(gpu, "this_machine", fail)
    (check,) = gpu.gpu_checks()
    assert (check.verdict, check.stops, check.mend) == ("wrong", True, gpu.GPU_EXTRA)


def test_without_a_gpu_engines_run_on_cpus(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu, "this_machine", lambda: NO_GPU)
    monkeypatch.setattr(gpu, "has_driver", lambda: False)
    checks = gpu.gpu_checks()
    assert checks[0].found == "none; engines run on CPUs"
    assert not any(check.stops for check in checks)
    monkeypatch.setattr(gpu, "has_driver", lambda: True)
    assert "though there is a driver" in gpu.gpu_checks()[0].found


@pytest.mark.gpu
def test_a_real_gpu():
    checks = {check.name: check for check in gpu.gpu_checks()}
    assert checks["gpu"].verdict == "ok"
    assert "sm_" in checks["gpu"].found
    assert checks["nvjpeg"].verdict == "ok"


@pytest.mark.parametrize("scheme", ["", "memory:/"])
def test_a_store_is_left_as_it_was(tmp_path: Path, scheme):
    uri = f"{scheme}{tmp_path}/outer/store"
    check = store_check(uri)
    assert (check.verdict, check.found.endswith("; no snapshot yet")) == ("ok", True)
    assert not (tmp_path / "outer").exists()
    commit_vectors(Store(uri), image=[{"a": [1, 0, 0, 0]}])
    check = store_check(uri)
    assert "snapshot 1 is current, 8 keys by 0123456789abcdef" in check.found
    assert [file.path for file in Store(uri).hidden_files("")] == []


def test_a_store_of_another_kind_or_damaged(tmp_path: Path):
    check = store_check("no-such-scheme://bucket")
    assert (check.verdict, check.stops) == ("wrong", True)
    (tmp_path / "snapshots").mkdir()
    (tmp_path / "snapshots" / "00000001.json").write_text("{")
    assert "is damaged" in store_check(str(tmp_path)).found


def test_a_store_that_replaces_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Store, "create", Store.publish)
    assert "replaced a file that was to be created anew" in store_check(str(tmp_path)).found


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_store_that_is_closed_to_us(tmp_path: Path):
    tmp_path.chmod(0o500)
    assert "cannot be written" in store_check(str(tmp_path)).found


def test_a_catalog_is_read(tmp_path: Path):
    write_rows(tmp_path / "catalog", [{"key": "a", "text": "x"}, {"key": "b", "text": "y"}])
    check = catalog_check(CatalogConfig(uri=str(tmp_path / "catalog")))
    assert (check.verdict, check.stops) == ("ok", False)
    assert check.found == "2 rows in 1 files: key key (string), text text (string)"
    wrong = catalog_check(CatalogConfig(uri=str(tmp_path / "catalog"), key_column="id"))
    assert wrong.stops
    assert "id" in wrong.found
    assert catalog_check(CatalogConfig(uri=str(tmp_path / "nothing"))).stops


def test_engines_are_listed(tmp_path: Path):
    check = engines_check(str(tmp_path / "none"))
    assert (check.verdict, "builds one in float32" in check.found) == ("ok", True)
    assert engines_check("no-such-scheme://bucket").stops
    damaged = tmp_path / "engines" / "fp32-0011223344556677"
    damaged.mkdir(parents=True)
    (damaged / "manifest.json").write_text("{")
    assert engines_check(str(tmp_path / "engines")).verdict in ("ok", "wrong")


@pytest.mark.parametrize(
    ("here", "verdict"),
    [(machine("sm_80"), "wrong"), (machine("sm_89"), "ok"), (NO_GPU, "ok"), (None, "ok")],
)
def test_promoted_engines_that_do_not_run_here_are_named(
    monkeypatch: pytest.MonkeyPatch, here, verdict
):
    engines = [
        SimpleNamespace(engine_id="fp8-00", is_promoted=True),
        SimpleNamespace(engine_id="fp16-00", is_promoted=True),
        SimpleNamespace(engine_id="fp8-11", is_promoted=False),
    ]
    monkeypatch.setattr(places, "list_engines", lambda registry: engines)
    check = engines_check("engines", machine=here)
    assert (check.verdict, check.stops) == (verdict, False)
    assert check.found.startswith("3 at engines; promoted: fp8-00, fp16-00")
    if verdict == "wrong":
        assert check.found.endswith("; of these fp8-00 do not run here")
        assert "--precision fp16" in check.mend
