"""Runs an engine's plans on a GPU with TensorRT or TensorRT for RTX; needs no torch.

Knows nothing of how plans are compiled, nor where inputs come from.
"""

import math
import weakref
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.backends.encoder import TowerEncoder
from engine.backends.execution import LoadedTower
from engine.backends.launches import Launches
from engine.backends.overlap import Pipeline, Slot
from engine.device import Device, open_device
from engine.errors import DeviceMemoryError, PlanError
from engine.manifest import Manifest, read_manifest
from engine.plans.plan import (
    LENGTH_STEP,
    PlanKey,
    PlanRecord,
    Shape,
    Tower,
    TowerPlan,
    check_fits,
    plan_file,
    read_plan,
    read_verified,
)
from engine.plans.runtimes import installed_library

_MIB = 2**20
_INPUT_DTYPES: dict[Tower, Any] = {"image": np.uint8, "text": np.int32}


@dataclass(frozen=True, kw_only=True, slots=True)
class TrtConfig:
    """How batches are taken through the GPU; results are the same with any."""

    num_slots: int = 3
    """Batches under way at once: one copied in, one computed, one copied out."""
    max_graphs: int = 192
    """CUDA graphs kept for each tower: one for each slot and shape, which for texts of 512 tokens
    makes 3 x 64. Beyond, the least recently used goes. 0: kernels are launched one by one."""

    def __post_init__(self) -> None:
        """Raise ValueError for a field out of bounds."""
        if self.num_slots < 1:
            raise ValueError(f"num_slots={self.num_slots!r}: expected 1 or more")
        if self.max_graphs < 0:
            raise ValueError(f"max_graphs={self.max_graphs!r}: expected 0 or more")


class TrtEncoder(TowerEncoder):
    """An `Encoder` on the current GPU, for one thread at a time.

    After a failure of CUDA all further work is refused. `close`, the end of a `with` block or
    garbage collection gives the GPU's memory back.
    """

    def __init__(
        self, engine_dir: Path, *, plan_dir: Path, config: TrtConfig = TrtConfig()
    ) -> None:
        """Load the towers.

        Args:
            engine_dir: The engine's folder, as the registry leaves it.
            plan_dir: The folder of one of its plans.
            config: How batches are taken through the GPU.

        Raises:
            EngineError: The folder holds no whole engine.
            PlanError: The plan is missing, damaged, of another engine, or for another card or
                version.
            DeviceError: There is no GPU or no TensorRT.
            DeviceMemoryError: The GPU has too little free memory; none of it is kept.
        """
        manifest = read_manifest(engine_dir)
        record = read_plan(plan_dir)
        device = open_device()
        library = installed_library(record.key.flavour)
        here = PlanKey(
            flavour=library.flavour,
            version=library.version,
            architecture=device.architecture,
            profile=record.key.profile,
        )
        check_fits(record, engine_id=manifest.engine_id, here=here)
        self.device_memory_bytes = needed_bytes(record, manifest=manifest, config=config)
        """On the GPU, as stated before any of it was allocated."""
        _check_memory(self.device_memory_bytes, record=record, device=device)

        resources = ExitStack()
        self._close = weakref.finalize(self, resources.close)
        with ExitStack() as undo:
            undo.callback(self._close)
            towers = {
                name: _Tower(
                    name,
                    plan,
                    loaded=LoadedTower(
                        read_verified(record, plan_dir, name=plan_file(name)),
                        name=str(plan_dir / plan_file(name)),
                        library=library,
                    ),
                    embedding_dim=manifest.embedding_dim,
                    device=device,
                    config=config,
                    resources=resources,
                )
                for name, plan in record.towers.items()
            }
            super().__init__(
                engine_dir, manifest=manifest, image=towers["image"], text=towers.get("text")
            )
            undo.pop_all()

    def close(self) -> None:
        """Give the GPU's memory back; the encoder can't be used any more."""
        self._close()

    def __enter__(self) -> "TrtEncoder":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def needed_bytes(record: PlanRecord, *, manifest: Manifest, config: TrtConfig) -> int:
    """What an encoder takes on the GPU: plans, scratch memory and buffers.

    CUDA graphs and what the libraries need for themselves come on top.
    """
    needed = 0
    for name, plan in record.towers.items():
        input_bytes, output_bytes = _buffer_bytes(name, plan, manifest.embedding_dim)
        buffer_bytes = config.num_slots * (input_bytes + output_bytes)
        needed += plan.plan_bytes + (plan.activation_bytes or 0) + buffer_bytes
    return needed


def _buffer_bytes(name: Tower, plan: TowerPlan, embedding_dim: int) -> tuple[int, int]:
    """Bytes of the largest input and of its float32 output."""
    input_bytes = math.prod(plan.max_shape) * np.dtype(_INPUT_DTYPES[name]).itemsize
    return input_bytes, plan.max_shape[0] * embedding_dim * np.dtype(np.float32).itemsize


def _check_memory(needed: int, *, record: PlanRecord, device: Device) -> None:
    free, total = device.memory()
    if needed > free:
        raise DeviceMemoryError(
            f"plan {record.key.plan_id} needs {needed / _MIB:,.0f} MiB of GPU memory, of "
            f"{total / _MIB:,.0f} MiB are {free / _MIB:,.0f} MiB free; end what else runs on the "
            f"GPU, or use a plan with fewer than {record.key.profile.max_rows} rows at a time"
        )


class _Tower:
    """A `TowerRunner` of one plan."""

    length_step = LENGTH_STEP

    def __init__(
        self,
        name: Tower,
        plan: TowerPlan,
        *,
        loaded: LoadedTower,
        embedding_dim: int,
        device: Device,
        config: TrtConfig,
        resources: ExitStack,
    ) -> None:
        resources.callback(loaded.unload)
        if loaded.input_dtype != _INPUT_DTYPES[name] or loaded.embedding_dim != embedding_dim:
            raise PlanError(
                f"the {name} plan takes {np.dtype(loaded.input_dtype)} and gives "
                f"{loaded.embedding_dim} dimensions, the engine's manifest says "
                f"{np.dtype(_INPUT_DTYPES[name])} and {embedding_dim}: build it anew"
            )
        self.max_rows = plan.max_shape[0]
        self._min_rows = plan.min_shape[0]
        self._row_bytes = embedding_dim * np.dtype(np.float32).itemsize
        input_bytes, output_bytes = _buffer_bytes(name, plan, embedding_dim)
        self._pipeline = Pipeline(
            device,
            num_slots=config.num_slots,
            input_bytes=input_bytes,
            output_bytes=output_bytes,
            resources=resources,
        )
        memory = device.allocate(loaded.memory_bytes or 1)
        resources.callback(device.free, memory)
        self._launches = Launches(
            loaded,
            memory=memory,
            device=device,
            stream=self._pipeline.stream,
            max_graphs=config.max_graphs,
        )
        resources.callback(self._launches.clear)
        resources.callback(self._pipeline.close)

    def run(self, batches: Iterable[NDArray[Any]]) -> Iterator[NDArray[np.float32]]:
        for result in self._pipeline.run(batches, self._compute):
            yield result.view(np.float32).reshape(-1, self._row_bytes // 4)

    def _compute(self, slot: Slot, shape: Shape) -> int:
        num_rows, *rest = shape
        # Rows are independent, so that whatever fills a short batch has no influence.
        self._launches.enqueue(slot, (max(num_rows, self._min_rows), *rest))
        return num_rows * self._row_bytes
