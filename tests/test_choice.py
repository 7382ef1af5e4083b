"""Which backend runs an engine: every case of the decision, what is said, and what is loaded."""

import shutil
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import tensorrt_rtx_bindings as rtx
import torch

from engine import device
from engine.backends.choice import (
    BACKENDS,
    NO_GPU,
    WANTED,
    Backend,
    Machine,
    Wanted,
    choose_backend,
    load_encoder,
    remark_on,
    this_machine,
)
from engine.backends.encoder import normalized
from engine.backends.onnx_cpu import OnnxCpuEncoder
from engine.backends.trt import TrtEncoder
from engine.build import load_or_build
from engine.checkpoint import find_checkpoint
from engine.errors import DeviceError, EngineError
from engine.manifest import Precision
from engine.plans.plan import PlanProfile
from engine.plans.plan_builder import PlanConfig, plan_key
from engine.registry import Engine, Registry
from tests.fake_builder import FakeBuilderApi
from tests.fake_gpu import FakeCuda
from tests.fake_tensorrt import (
    SMALL_BULK,
    FakeTensorrt,
    expected_embeddings,
    forget_libraries,
    write_plan,
)

NO_TENSORRT = "no TensorRT here: pip install 'clipmill[gpu]'"
BEFORE_FP8 = ("sm_75", "sm_80", "sm_86")
WITH_FP8 = ("sm_89", "sm_90", "sm_100", "sm_120")

# Wanted and precision -> what runs it without a GPU; and on a GPU with neither library that uses
# it, with TensorRT, with PyTorch, with both. "-" is an error.
ON_ANY_GPU = """
    auto        fp32   onnxruntime    onnxruntime onnxruntime onnxruntime onnxruntime
    auto        fp16   onnxruntime    -           tensorrt    torch       tensorrt
    onnxruntime fp32   onnxruntime    onnxruntime onnxruntime onnxruntime onnxruntime
    onnxruntime fp16   onnxruntime    onnxruntime onnxruntime onnxruntime onnxruntime
    onnxruntime fp8    onnxruntime    onnxruntime onnxruntime onnxruntime onnxruntime
    tensorrt    fp32   -              -           -           -           -
    tensorrt    fp16   -              -           tensorrt    -           tensorrt
    torch       fp32   -              -           -           -           -
    torch       fp16   -              -           -           torch       torch
"""
WHERE_THERE_IS_FP8 = """
    auto        fp8    onnxruntime    -           tensorrt    torch       tensorrt
    tensorrt    fp8    -              -           tensorrt    -           tensorrt
    torch       fp8    -              -           -           torch       torch
"""
WHERE_THERE_IS_NONE = """
    auto        fp8    onnxruntime    -           -           -           -
    tensorrt    fp8    -              -           -           -           -
    torch       fp8    -              -           -           -           -
"""


def gpu(
    architecture: str = "sm_90", *, has_tensorrt: bool = False, has_torch: bool = False
) -> Machine:
    fault = None if has_tensorrt else NO_TENSORRT
    return Machine(architecture=architecture, tensorrt_fault=fault, has_torch=has_torch)


def machines(architecture: str) -> list[Machine]:
    """In the order of the table's columns."""
    return [
        NO_GPU,
        gpu(architecture),
        gpu(architecture, has_tensorrt=True),
        gpu(architecture, has_torch=True),
        gpu(architecture, has_tensorrt=True, has_torch=True),
    ]


def cases(table: str, architectures: tuple[str, ...]) -> list[tuple[Any, ...]]:
    return [
        (wanted, precision, architecture, answers)
        for wanted, precision, *answers in map(str.split, table.strip().splitlines())
        for architecture in architectures
    ]


ALL_CASES = [
    *cases(ON_ANY_GPU, BEFORE_FP8 + WITH_FP8),
    *cases(WHERE_THERE_IS_FP8, WITH_FP8),
    *cases(WHERE_THERE_IS_NONE, BEFORE_FP8),
]


def answer(wanted: Wanted, precision: Precision, machine: Machine) -> str:
    try:
        return choose_backend(wanted, precision=precision, machine=machine)
    except EngineError:
        return "-"


@pytest.mark.parametrize(("wanted", "precision", "architecture", "answers"), ALL_CASES)
def test_every_case(
    wanted: Wanted, precision: Precision, architecture: str, answers: list[str]
) -> None:
    given = [answer(wanted, precision, machine) for machine in machines(architecture)]
    assert given == answers


def test_the_table_has_every_case() -> None:
    asked = {(wanted, precision) for wanted, precision, *_ in ALL_CASES}
    assert asked == {(wanted, name) for wanted in WANTED for name in get_args(Precision)}
    assert ("auto", *BACKENDS) == WANTED
    assert len(ALL_CASES) == len(asked) * len(BEFORE_FP8 + WITH_FP8)


@pytest.mark.parametrize(
    ("wanted", "precision", "machine", "kind", "parts"),
    [
        (
            "tensorrt",
            "fp32",
            gpu(has_tensorrt=True),
            EngineError,
            ["--backend tensorrt runs fp16 and fp8 engines, this one is fp32", "onnxruntime"],
        ),
        (
            "torch",
            "fp32",
            NO_GPU,
            EngineError,
            ["--backend torch runs fp16 and fp8", "an engine of `clipmill engine build`"],
        ),
        (
            "torch",
            "fp8",
            NO_GPU,
            DeviceError,
            ["--backend torch needs a GPU, and there is none: use --backend auto"],
        ),
        (
            "auto",
            "fp8",
            gpu("sm_86", has_tensorrt=True, has_torch=True),
            DeviceError,
            [
                "this GPU (sm_86) has no FP8",
                "`clipmill engine build --precision fp16`",
                "--backend onnxruntime to run on the CPU",
            ],
        ),
        (
            "auto",
            "fp16",
            gpu(),
            DeviceError,
            [
                "there is a GPU (sm_90), but nothing that can use it (TensorRT: no TensorRT here",
                "pip install 'clipmill[gpu]'; PyTorch: not installed, or not for CUDA)",
                "--backend onnxruntime to run on the CPU",
            ],
        ),
        (
            "tensorrt",
            "fp8",
            gpu(has_torch=True),
            DeviceError,
            ["nothing that can use it (TensorRT: no TensorRT here: pip install 'clipmill[gpu]')"],
        ),
        (
            "torch",
            "fp8",
            gpu(has_tensorrt=True),
            DeviceError,
            ["nothing that can use it (PyTorch: not installed, or not for CUDA)"],
        ),
    ],
)
def test_an_error_says_what_is_missing_and_what_to_do(
    wanted: Wanted, precision: Precision, machine: Machine, kind: type[Exception], parts: list[str]
) -> None:
    with pytest.raises(EngineError) as caught:
        choose_backend(wanted, precision=precision, machine=machine)
    assert type(caught.value) is kind
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("backend", "precision", "machine", "said"),
    [
        ("tensorrt", "fp8", gpu(has_tensorrt=True), None),
        ("onnxruntime", "fp32", NO_GPU, None),
        ("onnxruntime", "fp8", NO_GPU, "on the CPU, since there is no GPU"),
        (
            "torch",
            "fp8",
            gpu(has_torch=True),
            f"by PyTorch, since TensorRT can't be used: {NO_TENSORRT}",
        ),
    ],
)
def test_what_is_passed_over_is_said(
    backend: Backend, precision: Precision, machine: Machine, said: str | None
) -> None:
    assert remark_on(backend, precision=precision, machine=machine) == said


# What this machine has


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """With neither TensorRT, a PyTorch that sees no GPU, no driver, unless a test says so."""
    forget_libraries(monkeypatch)
    monkeypatch.setattr(device, "_DRIVER_PATHS", ())
    for name in ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return monkeypatch


def put_gpu(libraries: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0)) -> None:
    libraries.setitem(sys.modules, "cuda.bindings.runtime", FakeCuda(capability=capability))


def test_no_driver_no_gpu(libraries: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda()
    cuda.fail("cudaDeviceGetAttribute", "cudaErrorInsufficientDriver", forever=True)
    libraries.setitem(sys.modules, "cuda.bindings.runtime", cuda)
    libraries.setitem(sys.modules, "tensorrt", FakeBuilderApi())
    assert this_machine() == NO_GPU


def test_no_cuda_for_python_no_gpu(libraries: pytest.MonkeyPatch) -> None:
    libraries.setitem(sys.modules, "cuda.bindings.runtime", None)
    assert this_machine() == NO_GPU


@pytest.mark.parametrize("has_cuda", [False, True])
def test_a_gpu_that_cuda_for_python_does_not_reach_is_not_taken_for_none(
    libraries: pytest.MonkeyPatch, tmp_path: Path, has_cuda: bool
) -> None:
    libraries.setattr(device, "_DRIVER_PATHS", (tmp_path,))
    cuda = None
    if has_cuda:
        cuda = FakeCuda()
        cuda.fail("cudaDeviceGetAttribute", "cudaErrorInsufficientDriver", forever=True)
    libraries.setitem(sys.modules, "cuda.bindings.runtime", cuda)
    text = "driver is missing or too old" if has_cuda else "CUDA for Python is missing"
    with pytest.raises(DeviceError, match=text):
        this_machine()
    libraries.setattr(torch.cuda, "is_available", lambda: True)
    libraries.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    found = this_machine()
    assert (found.architecture, found.has_torch) == ("sm_89", True)
    assert text in str(found.tensorrt_fault)


def test_a_gpu_that_nothing_uses(libraries: pytest.MonkeyPatch) -> None:
    put_gpu(libraries)
    found = this_machine()
    assert (found.architecture, found.has_torch) == ("sm_90", False)
    assert "no TensorRT here" in str(found.tensorrt_fault)


def test_tensorrt_and_torch_are_found(libraries: pytest.MonkeyPatch) -> None:
    put_gpu(libraries)
    libraries.setitem(sys.modules, "tensorrt", FakeBuilderApi())
    assert this_machine() == gpu("sm_90", has_tensorrt=True)
    libraries.setattr(torch.cuda, "is_available", lambda: True)
    libraries.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert this_machine() == gpu("sm_90", has_tensorrt=True, has_torch=True)
    libraries.setitem(sys.modules, "torch", None)  # not installed
    assert this_machine() == gpu("sm_90", has_tensorrt=True)


def test_a_tensorrt_that_is_too_old_counts_as_none(libraries: pytest.MonkeyPatch) -> None:
    put_gpu(libraries)
    libraries.setitem(sys.modules, "tensorrt", FakeBuilderApi("10.12.0.36"))
    assert "TensorRT 10.12.0.36 is too old" in str(this_machine().tensorrt_fault)


@pytest.mark.parametrize(
    ("capability", "serves"), [((8, 9), True), ((12, 0), True), ((9, 0), False)]
)
def test_tensorrt_for_rtx_serves_some_cards(
    libraries: pytest.MonkeyPatch, capability: tuple[int, int], serves: bool
) -> None:
    put_gpu(libraries, capability)
    libraries.setitem(sys.modules, "tensorrt_rtx_bindings", rtx)
    assert (this_machine().tensorrt_fault is None) == serves


# What is loaded


@pytest.fixture(scope="module")
def registry(engines_dir: Path) -> Registry:
    return Registry(str(engines_dir))


@pytest.fixture(scope="module")
def engine(registry: Registry, checkpoint_dir: Path) -> Engine:
    return load_or_build(find_checkpoint(str(checkpoint_dir)), registry=registry)


def random_pixels(engine: Engine, *, num_rows: int) -> np.ndarray:
    size = (engine.manifest.preprocessing.height, engine.manifest.preprocessing.width, 3)
    return np.random.default_rng(0).integers(0, 256, (num_rows, *size), dtype=np.uint8)


def test_onnxruntime_runs_the_engine_on_as_many_threads_as_told(
    registry: Registry, engine: Engine
) -> None:
    encoder = load_encoder(engine, backend="onnxruntime", registry=registry, num_threads=3)
    assert type(encoder) is OnnxCpuEncoder
    assert encoder.manifest == engine.manifest
    assert encoder._image._session.get_session_options().intra_op_num_threads == 3
    pixels = random_pixels(engine, num_rows=2)
    direct = OnnxCpuEncoder(engine.directory, num_threads=1)
    np.testing.assert_allclose(
        encoder.encode_images(pixels), direct.encode_images(pixels), atol=1e-6
    )


def test_tensorrt_runs_the_plan_of_the_profile_that_is_asked_for(
    libraries: pytest.MonkeyPatch, engine: Engine, tmp_path: Path
) -> None:
    registry = Registry(str(tmp_path))  # the plans are no plans: they go nowhere else
    shutil.copytree(engine.directory, tmp_path / engine.manifest.engine_id)
    cuda = FakeCuda()
    api = FakeTensorrt(cuda)
    libraries.setitem(sys.modules, "cuda.bindings.runtime", cuda)
    libraries.setitem(sys.modules, "tensorrt", api)
    pixels = random_pixels(engine, num_rows=3)
    for profile, num_rows in ((SMALL_BULK, 4), (PlanProfile(kind="query", max_rows=8), 3)):
        registry.obtain_plan(
            engine.manifest.engine_id,
            plan_key(PlanConfig(profile=profile)).plan_id,
            lambda path, profile=profile: write_plan(
                path, engine.directory, api=api, profile=profile
            ),
        )
        encoder = load_encoder(
            engine, backend="tensorrt", registry=registry, num_threads=1, profile=profile
        )
        assert isinstance(encoder, TrtEncoder)
        with encoder:
            api.shapes.clear()
            assert np.array_equal(
                encoder.encode_images(pixels),
                normalized(expected_embeddings(pixels, engine.manifest.embedding_dim)),
            )
            assert {shape[0] for shape in api.shapes} == {num_rows}


def test_a_backend_that_cannot_run_here_is_an_error_and_no_other_takes_its_place(
    libraries: pytest.MonkeyPatch, registry: Registry, engine: Engine
) -> None:
    with pytest.raises(DeviceError, match=r"no TensorRT here: pip install 'clipmill\[gpu\]'"):
        load_encoder(engine, backend="tensorrt", registry=registry, num_threads=1)
    with pytest.raises(EngineError, match="is fp32, the torch backend runs fp8 and fp16"):
        load_encoder(engine, backend="torch", registry=registry, num_threads=1)
