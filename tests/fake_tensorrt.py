"""A TensorRT that executes plans of its own on a `FakeCuda`, with answers that tests know.

Each class has the names that one version of TensorRT has, and no others.
"""

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.manifest import file_digest, read_manifest
from engine.plans import runtimes
from engine.plans.plan import PlanKey, PlanProfile, PlanRecord, TowerPlan, input_shapes, plan_file
from tests.fake_gpu import FakeCuda

MEMORY_BYTES = 4096
SMALL_BULK = PlanProfile(kind="bulk", max_rows=4)


def forget_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let TensorRT be imported anew in this test; a real one holds on to its first logger."""
    monkeypatch.setattr(runtimes, "_imported", functools.cache(runtimes._imported.__wrapped__))


def plan_bytes(*, input_name: str, dim: int, min_shape: Any, max_shape: Any) -> bytes:
    """A plan: what the engine needs to know."""
    return json.dumps(
        {"input": input_name, "dim": dim, "min": list(min_shape), "max": list(max_shape)}
    ).encode()


def write_plan(
    plan_dir: Path, engine_dir: Path, *, api: "FakeTensorrt", profile: PlanProfile = SMALL_BULK
) -> Path:
    """A plan folder of the made-up TensorRT for the made-up card."""
    manifest = read_manifest(engine_dir)
    plan_dir.mkdir(exist_ok=True)
    towers = {}
    for tower, (smallest, largest) in input_shapes(manifest, profile).items():
        content = plan_bytes(
            input_name={"image": "pixels", "text": "token_ids"}[tower],
            dim=manifest.embedding_dim,
            min_shape=smallest,
            max_shape=largest,
        )
        (plan_dir / plan_file(tower)).write_bytes(content)
        towers[tower] = TowerPlan(
            min_shape=smallest,
            max_shape=largest,
            plan_bytes=len(content),
            activation_bytes=MEMORY_BYTES,
            num_fp8_products=0,
            fallbacks=(),
        )
    PlanRecord(
        engine_id=manifest.engine_id,
        key=PlanKey(
            flavour="tensorrt_rtx" if isinstance(api, FakeTensorrtRtx) else "tensorrt",
            version=api.__version__,
            architecture="sm_90",
            profile=profile,
        ),
        build_seconds=1.0,
        files={path.name: file_digest(path) for path in sorted(plan_dir.iterdir())},
        **towers,
    ).write(plan_dir)
    return plan_dir


def expected_embeddings(rows: np.ndarray, dim: int) -> np.ndarray:
    """What an execution gives for each row, whatever stands beside it: float32 [N, dim]."""
    places = np.sqrt(np.arange(1, np.prod(rows.shape[1:]) + 1))
    # Row by row: the sum of a product of matrices depends on how many rows it has.
    sums = np.array([np.dot(row.ravel().astype(np.float64), places) for row in rows])
    raw = np.cos(np.outer(sums, np.sqrt(np.arange(1, dim + 1))) * 1e-3) + 0.01
    return (raw / np.linalg.norm(raw, axis=1, keepdims=True)).astype(np.float32)


class FakeTensorrt:
    """Stands for the module `tensorrt`, 10.13 to 11."""

    __version__ = "11.4.0.106"

    class ILogger:
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    class TensorIOMode:
        NONE, INPUT, OUTPUT = range(3)

    class ProfilingVerbosity:
        NONE = "none"

    class ExecutionContextAllocationStrategy:
        USER_MANAGED = "user managed"

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda
        self.engine_class: type[_Engine] = _Engine10
        self.answer: Any = expected_embeddings
        self.refuses: str | None = None
        """A step that fails."""
        self.reason = "out of sorts"
        """What the library says of it."""
        self.shapes: list[tuple[int, ...]] = []
        """Of all contexts made."""

    def nptype(self, dtype: Any) -> Any:
        return dtype

    def Runtime(self, logger: Any) -> Any:  # noqa: N802
        if self.refuses_to("start", logger):
            raise TypeError("pybind11::init(): factory function returned nullptr")
        return _Runtime(self, logger)

    def refuses_to(self, step: str, logger: Any) -> bool:
        if step == self.refuses:
            logger.log(self.ILogger.ERROR, self.reason)
        return step == self.refuses


class FakeTensorrt8(FakeTensorrt):
    """Stands for the module `tensorrt`, 8.6."""

    __version__ = "8.6.0"
    ExecutionContextAllocationStrategy: Any = None

    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__(cuda)
        self.engine_class = _Engine8


class FakeTensorrtRtx(FakeTensorrt):
    """Stands for the module `tensorrt_rtx`."""

    __version__ = "1.7.1.116"

    class DynamicShapesKernelSpecializationStrategy:
        EAGER = "eager"

    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__(cuda)
        self.engine_class = _EngineRtx
        self.capturable = True


class _Runtime:
    def __init__(self, api: FakeTensorrt, logger: Any) -> None:
        self._api = api
        self._logger = logger

    def deserialize_cuda_engine(self, plan: bytes) -> Any:
        if self._api.refuses_to("load", self._logger):
            return None
        return self._api.engine_class(self._api, self._logger, plan)


class _Engine:
    num_io_tensors = 2

    def __init__(self, api: Any, logger: Any, plan: bytes) -> None:
        self.api = api
        self.logger = logger
        self.plan = json.loads(plan)
        self._weights = api.cuda.take(len(plan))

    def __del__(self) -> None:
        del self.api.cuda.memory[self._weights]

    def get_tensor_name(self, number: int) -> str:
        return (self.plan["input"], "embeddings")[number]

    def get_tensor_mode(self, name: str) -> int:
        modes = self.api.TensorIOMode
        return modes.OUTPUT if name == "embeddings" else modes.INPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return {"pixels": np.uint8, "token_ids": np.int32, "embeddings": np.float32}[name]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        shape = (self.plan["dim"],) if name == "embeddings" else self.plan["max"][1:]
        return (-1, *shape)

    def _made(self, context: type["_Context"]) -> Any:
        if self.api.refuses_to("create", self.logger):
            return None
        return context(self)


class _Engine10(_Engine):
    device_memory_size_v2 = MEMORY_BYTES

    def create_execution_context(self, strategy: Any) -> Any:
        assert strategy == self.api.ExecutionContextAllocationStrategy.USER_MANAGED
        return self._made(_Context10)


class _Engine8(_Engine):
    device_memory_size = MEMORY_BYTES

    def create_execution_context_without_device_memory(self) -> Any:
        return self._made(_Context8)


class _RuntimeConfig:
    strategy: Any = None
    cache: Any = None
    dynamic_shapes_kernel_specialization_strategy: Any = "lazy"

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> Any:
        return object()

    def set_runtime_cache(self, cache: Any) -> bool:
        self.cache = cache
        return True


class _EngineRtx(_Engine):
    device_memory_size_v2 = MEMORY_BYTES

    def create_runtime_config(self) -> _RuntimeConfig:
        return _RuntimeConfig()

    def create_execution_context(self, config: _RuntimeConfig) -> Any:
        assert config.strategy == self.api.ExecutionContextAllocationStrategy.USER_MANAGED
        assert config.dynamic_shapes_kernel_specialization_strategy == "eager"
        assert config.cache is not None
        return self._made(_ContextRtx)


class _Context:
    nvtx_verbosity = "detailed"

    def __init__(self, engine: _Engine) -> None:
        self._engine = engine
        self._memory: int | None = None
        self._shape: tuple[int, ...] | None = None
        self._addresses: dict[str, int] = {}
        self._has_run = False

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        plan, api = self._engine.plan, self._engine.api
        fits = name == plan["input"] and all(
            low <= size <= high
            for low, size, high in zip(plan["min"], shape, plan["max"], strict=True)
        )
        if not fits or api.refuses_to("shape", self._engine.logger):
            return False
        self._shape = shape
        api.shapes.append(shape)
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        engine, api = self._engine, self._engine.api
        cuda = api.cuda
        captured = cuda.streams[stream].captured is not None
        if captured and not self._has_run:
            raise AssertionError("the first run of a context cannot be captured")
        if api.refuses_to("capture" if captured else "run", engine.logger):
            return False
        self._has_run = True
        assert self._memory is not None
        assert self._shape is not None
        memory, shape, dim = self._memory, self._shape, engine.plan["dim"]
        source, target = self._addresses[engine.plan["input"]], self._addresses["embeddings"]
        dtype = engine.get_tensor_dtype(engine.plan["input"])

        def run() -> None:
            cuda.array(memory, np.uint8, (MEMORY_BYTES,))[:] = 7
            rows = cuda.array(source, dtype, shape)
            cuda.array(target, np.float32, (shape[0], dim))[:] = api.answer(rows, dim)

        cuda.enqueue(stream, run)
        return True


class _Context8(_Context):
    @property
    def device_memory(self) -> Any:
        raise NotImplementedError

    @device_memory.setter
    def device_memory(self, address: int) -> None:
        self._memory = address


class _Context10(_Context):
    def set_device_memory(self, address: int, num_bytes: int) -> None:
        assert num_bytes == MEMORY_BYTES
        self._memory = address


class _ContextRtx(_Context10):
    def is_stream_capturable(self, stream: int) -> bool:
        return self._engine.api.capturable
