"""Which cards run an engine, and what becomes of their errors."""

import subprocess

import pytest
import torch

from engine.backends.torch_device import check_capability, find_device, full_float32, typed_errors
from engine.errors import DeviceError, DeviceMemoryError

DEVICE = torch.device("cuda", 0)


def test_a_card_without_fp8_is_refused_for_fp8_alone() -> None:
    with pytest.raises(DeviceError, match=r"GPU \(sm_80\) has no FP8: .* --precision fp16`"):
        check_capability((8, 0), precision="fp8")
    check_capability((8, 0), precision="fp16")
    for capability in ((8, 9), (9, 0), (12, 0)):
        check_capability(capability, precision="fp8")


def test_no_such_card() -> None:
    with pytest.raises(DeviceError, match=r"sees no CUDA GPU 99: .*--backend onnxruntime"):
        find_device(99, precision="fp16")


def test_no_compiler_for_triton() -> None:
    with (
        pytest.raises(DeviceError, match="install gcc, or name a compiler in"),
        typed_errors(DEVICE, max_rows=1),
    ):
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable")
    with (
        pytest.raises(DeviceError, match="python3-dev"),
        typed_errors(DEVICE, max_rows=1),
    ):
        raise subprocess.CalledProcessError(1, ["gcc", "main.c"])


def test_a_kernel_that_triton_cannot_build(monkeypatch: pytest.MonkeyPatch) -> None:
    triton_errors = pytest.importorskip(
        "triton.errors", reason="triton is not installed; it comes with PyTorch for CUDA"
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Card")
    with (
        pytest.raises(DeviceError, match=r"GPU 0 \(Card\): Triton cannot build a kernel for it"),
        typed_errors(DEVICE, max_rows=1),
    ):
        raise triton_errors.TritonError("no such sm_999")


def test_an_error_without_words_stays_one() -> None:
    with pytest.raises(RuntimeError, match=r"^$"), typed_errors(DEVICE, max_rows=1):
        raise RuntimeError


def test_errors_that_are_not_the_cards_stay_as_they_are() -> None:
    with pytest.raises(RuntimeError, match=r"^Sizes must match$"), typed_errors(DEVICE, max_rows=1):
        raise RuntimeError("Sizes must match")


def test_float32_is_full_within_the_block_alone() -> None:
    assert torch.backends.cudnn.allow_tf32
    with full_float32():
        assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.allow_tf32
    with pytest.raises(KeyError), full_float32():
        raise KeyError
    assert torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize(
    ("max_rows", "way_out"),
    [
        (7, "for batches of 7 rows: use smaller batches, or stop what else runs on it"),
        (None, "too little: stop what else runs on it, or use a larger card"),
    ],
)
def test_out_of_memory_has_a_way_out(
    monkeypatch: pytest.MonkeyPatch, max_rows: int | None, way_out: str
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2**29, 2**33))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Card")
    with pytest.raises(DeviceMemoryError) as caught, typed_errors(DEVICE, max_rows=max_rows):
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert str(caught.value).startswith("GPU 0 (Card) has 0.5 of 8.0 GiB free, too little")
    assert str(caught.value).endswith(way_out)


@pytest.mark.gpu
def test_a_convolution_in_full_float32() -> None:
    torch.manual_seed(0)
    convolution = torch.nn.Conv2d(64, 64, 16, stride=16)
    x = torch.randn(8, 64, 64, 64)
    with torch.inference_mode(), full_float32():
        expected, ours = convolution(x), convolution.to(DEVICE)(x.to(DEVICE)).cpu()
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)  # TF32: 3e-4


@pytest.mark.gpu
def test_out_of_memory() -> None:
    with (
        pytest.raises(DeviceMemoryError, match=r"GiB free, too little for batches of 7 rows"),
        typed_errors(DEVICE, max_rows=7),
    ):
        torch.empty(2**50, dtype=torch.uint8, device=DEVICE)


@pytest.mark.gpu
def test_a_failed_call() -> None:
    with (
        pytest.raises(DeviceError, match=r"GPU 0 \(.*\): a call failed \(.*CUBLAS_STATUS.*again"),
        typed_errors(DEVICE, max_rows=1),
    ):
        raise RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling cublasLtMatmul")
