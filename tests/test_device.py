"""CUDA's results as errors, and graphs; with a GPU that is made up."""

import ast
import inspect
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda.bindings import runtime as real

from engine import device
from engine.device import Card, Device, open_device
from engine.errors import DeviceError, DeviceLostError, DeviceMemoryError, NoGpuError
from tests.fake_gpu import MIB, FakeCuda


@pytest.fixture
def cuda() -> FakeCuda:
    return FakeCuda(capability=(8, 9), total_bytes=MIB)


def test_all_calls_exist() -> None:
    tree = ast.parse(inspect.getsource(device))
    named = {
        call.args[0].value
        for call in ast.walk(tree)
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and call.func.attr in ("_call", "_release")
        and isinstance(call.args[0], ast.Constant)
    }
    attributes = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr.startswith("cuda")
    }
    assert {"cudaMemcpyAsync", "cudaGraphExecDestroy"} <= named
    missing = {
        name
        for name in named | attributes
        if not any(
            hasattr(owner, name)
            for owner in (
                real,
                real.cudaDeviceAttr,
                real.cudaMemcpyKind,
                real.cudaStreamCaptureMode,
            )
        )
    }
    assert not missing
    assert {name for name in dir(FakeCuda) if name.startswith("cuda")} <= set(dir(real))
    errors = {error.name for error in real.cudaError_t}
    assert device._STICKY | set(device._UNUSABLE) <= errors


def test_what_there_is_is_named(cuda: FakeCuda) -> None:
    gpu = Device(cuda)
    assert gpu.cards() == [Card(name="NVIDIA H200", architecture="sm_89", num_bytes=MIB)]
    assert gpu.driver_cuda() == "13.1"


def test_architecture_and_memory(cuda: FakeCuda) -> None:
    gpu = Device(cuda)
    assert gpu.architecture == "sm_89"
    assert gpu.memory() == (MIB, MIB)
    address = gpu.allocate(1000)
    assert gpu.memory() == (MIB - 1000, MIB)
    assert not cuda.array(address, np.uint8, (1000,)).any()
    gpu.free(address)
    assert gpu.memory() == (MIB, MIB)


def test_out_of_memory(cuda: FakeCuda) -> None:
    with pytest.raises(DeviceMemoryError, match="cudaMalloc: out of memory; end what else runs"):
        Device(cuda).allocate(2 * MIB)


@pytest.mark.parametrize(
    ("error", "has_driver", "kind", "text"),
    [
        ("InsufficientDriver", False, NoGpuError, "its NVIDIA driver is missing or too old"),
        ("InsufficientDriver", True, DeviceError, "its NVIDIA driver is missing or too old"),
        ("SystemDriverMismatch", True, DeviceError, "parts are of different versions; reboot"),
        ("NoDevice", True, NoGpuError, "is CUDA_VISIBLE_DEVICES empty"),
    ],
)
def test_no_gpu_is_told_from_one_that_cannot_be_used(
    cuda: FakeCuda,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    error: str,
    has_driver: bool,
    kind: type[DeviceError],
    text: str,
) -> None:
    driver = tmp_path / "nvidiactl"
    if has_driver:
        driver.touch()
    monkeypatch.setattr(device, "_DRIVER_PATHS", (driver,))
    cuda.fail("cudaDeviceGetAttribute", f"cudaError{error}")
    with pytest.raises(DeviceError, match=text) as caught:
        Device(cuda)
    assert type(caught.value) is kind


def test_after_a_sticky_error_nothing_is_asked_any_more(cuda: FakeCuda) -> None:
    gpu = Device(cuda)
    stream, event, address = gpu.create_stream(), gpu.create_event(), gpu.allocate(8)
    cuda.fail("cudaStreamSynchronize", "cudaErrorLaunchFailure")
    for _ in range(2):
        with pytest.raises(
            DeviceLostError, match="cudaStreamSynchronize failed: cudaErrorLaunchFailur"
        ):
            gpu.synchronize(stream)
    with pytest.raises(DeviceLostError, match="start it anew"):
        gpu.record(event, stream)
    num_calls = sum(cuda.calls.values())
    gpu.settle(stream)
    gpu.free(address)
    gpu.destroy_event(event)
    gpu.destroy_stream(stream)
    assert sum(cuda.calls.values()) == num_calls


def test_other_errors_pass(cuda: FakeCuda) -> None:
    gpu = Device(cuda)
    stream = gpu.create_stream()
    cuda.fail("cudaStreamSynchronize", "cudaErrorInvalidValue")
    with pytest.raises(
        DeviceError, match=r"^cudaStreamSynchronize failed: cudaErrorInvalidValue$"
    ) as caught:
        gpu.synchronize(stream)
    assert not isinstance(caught.value, DeviceLostError)
    gpu.synchronize(stream)


def test_copies_there_and_back(cuda: FakeCuda) -> None:
    gpu = Device(cuda)
    stream, address = gpu.create_stream(), gpu.allocate(8)
    source, target = gpu.allocate_pinned(8), gpu.allocate_pinned(8)
    source[:] = range(8)
    gpu.upload(source[:6], address, stream)
    gpu.download(address, target, stream)
    gpu.synchronize(stream)
    assert target.tolist() == [0, 1, 2, 3, 4, 5, 0, 0]
    gpu.free_pinned(source)
    gpu.free_pinned(target)
    assert cuda.live().keys() == {"memory", "streams"}


def test_a_graph_replays_what_was_enqueued(cuda: FakeCuda) -> None:
    gpu = Device(cuda)
    stream, address = gpu.create_stream(), gpu.allocate(8)
    source = gpu.allocate_pinned(8)

    def enqueue() -> bool:
        gpu.upload(source, address, stream)
        return True

    graph = gpu.capture(enqueue, stream)
    for value in (1, 2):
        source[:] = value
        gpu.launch(graph, stream)
        gpu.synchronize(stream)
        assert cuda.array(address, np.uint8, (8,)).tolist() == [value] * 8
    gpu.destroy_graph(graph)
    assert "graphs" not in cuda.live()


@pytest.mark.parametrize("enqueued", [True, False])
def test_what_cannot_be_captured(cuda: FakeCuda, enqueued: bool) -> None:
    gpu = Device(cuda)
    stream = gpu.create_stream()
    if enqueued:
        cuda.fail("cudaStreamEndCapture", "cudaErrorStreamCaptureUnsupported")
    assert gpu.capture(lambda: enqueued, stream) is None
    assert "graphs" not in cuda.live()
    gpu.synchronize(stream)


def test_cuda_for_python_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    with pytest.raises(DeviceError, match=r"pip install 'clipmill\[gpu\]'"):
        open_device()


def test_open_device(monkeypatch: pytest.MonkeyPatch, cuda: Any) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", cuda)
    assert open_device().architecture == "sm_89"


def without_gpu() -> bool:
    try:
        open_device()
    except DeviceError:
        return True
    return False


@pytest.mark.skipif(not without_gpu(), reason="with a GPU, CUDA is called for real below")
def test_the_real_cuda_takes_the_arguments() -> None:
    gpu = Device.__new__(Device)
    gpu._cuda, gpu._lost = real, None
    stream, event, memory = real.cudaStream_t(0), real.cudaEvent_t(0), np.zeros(8, dtype=np.uint8)
    graph = real.cudaGraphExec_t(0)
    for call in (
        gpu.memory,
        lambda: gpu.allocate(8),
        lambda: gpu.free(4096),
        lambda: gpu.allocate_pinned(8),
        lambda: gpu.free_pinned(memory),
        gpu.create_stream,
        lambda: gpu.destroy_stream(stream),
        lambda: gpu.synchronize(stream),
        lambda: gpu._call("cudaMemset", 4096, 0, 8),
        lambda: gpu._call("cudaStreamSynchronize", device._DEFAULT_STREAM),
        gpu.create_event,
        lambda: gpu.destroy_event(event),
        lambda: gpu.record(event, stream),
        lambda: gpu.wait(stream, event),
        lambda: gpu.synchronize_event(event),
        lambda: gpu.upload(memory, 4096, stream),
        lambda: gpu.download(4096, memory, stream),
        lambda: gpu.capture(lambda: True, stream),
        lambda: gpu._call("cudaGraphInstantiate", real.cudaGraph_t(0), 0),
        lambda: gpu._call("cudaGraphDestroy", real.cudaGraph_t(0)),
        lambda: gpu.launch(graph, stream),
        lambda: gpu.destroy_graph(graph),
    ):
        with pytest.raises(DeviceError, match=r"no GPU can be used"):
            call()


@pytest.mark.gpu
def test_a_real_gpu() -> None:
    gpu = open_device()
    assert gpu.architecture.startswith("sm_")
    free, total = gpu.memory()
    assert 0 < free <= total
    address, stream, event = gpu.allocate(8 * MIB), gpu.create_stream(), gpu.create_event()
    source, target = gpu.allocate_pinned(8 * MIB), gpu.allocate_pinned(8 * MIB)
    gpu.download(address, target, stream)
    gpu.synchronize(stream)
    assert not target.any()

    def enqueue() -> bool:
        gpu.upload(source, address, stream)
        gpu.download(address, target, stream)
        return True

    graph = gpu.capture(enqueue, stream)
    for value in (1, 2):
        source[:] = value
        gpu.launch(graph, stream)
        gpu.record(event, stream)
        gpu.synchronize_event(event)
        assert (target == value).all()
    gpu.destroy_graph(graph)
    gpu.free_pinned(source)
    gpu.free_pinned(target)
    gpu.destroy_event(event)
    gpu.destroy_stream(stream)
    gpu.free(address)
    with pytest.raises(DeviceMemoryError):
        gpu.allocate(2 * total)
