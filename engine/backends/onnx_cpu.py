"""Runs an engine's ONNX towers on the CPU with ONNX Runtime.

Knows nothing of how the engine was built or where its inputs come from.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import onnxruntime.capi.onnxruntime_pybind11_state as runtime_errors
from numpy.typing import NDArray

from engine.backends.encoder import TowerEncoder
from engine.errors import EngineError
from engine.manifest import IMAGE_ONNX, TEXT_ONNX, read_manifest

# Rows given to the runtime at once. Activations of this many images stay in a few hundred MB for
# ViT-L; larger gains nothing on a CPU.
ROWS_PER_CALL = 16

_LOAD_ERRORS = (
    runtime_errors.Fail,
    runtime_errors.InvalidArgument,
    runtime_errors.InvalidGraph,
    runtime_errors.InvalidProtobuf,
    runtime_errors.NoSuchFile,
    runtime_errors.NotImplemented,
    runtime_errors.RuntimeException,
)


class OnnxCpuEncoder(TowerEncoder):
    """An `Encoder` on CPU cores.

    An fp32 engine runs in float32. Of an fp16 or fp8 engine it runs the very graph that TensorRT
    compiles: FP8 rounds as it does there, but what is 16 bit there is computed in float32 here,
    without its roundings and beyond its range.
    """

    def __init__(self, engine_dir: Path, *, num_threads: int) -> None:
        """Load the towers.

        Args:
            engine_dir: The engine's folder, as the registry leaves it.
            num_threads: Threads within one operator.

        Raises:
            EngineError: The folder holds no whole engine.
        """
        manifest = read_manifest(engine_dir)
        super().__init__(
            engine_dir,
            manifest=manifest,
            image=_Tower(engine_dir / IMAGE_ONNX, num_threads=num_threads),
            text=(
                None
                if manifest.text is None
                else _Tower(engine_dir / TEXT_ONNX, num_threads=num_threads)
            ),
        )


class _Tower:
    """A `TowerRunner` of one ONNX file."""

    max_rows = ROWS_PER_CALL
    length_step = 1

    def __init__(self, path: Path, *, num_threads: int) -> None:
        self._session = _session(path, num_threads=num_threads)
        self._input_name = self._session.get_inputs()[0].name

    def run(self, batches: Iterable[NDArray[Any]]) -> Iterator[NDArray[np.float32]]:
        for batch in batches:
            embeddings: NDArray[np.float32] = self._session.run(None, {self._input_name: batch})[0]
            yield embeddings


def _session(path: Path, *, num_threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.log_severity_level = 3  # errors only
    # Idle threads that spin would take the cores from decoding.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Arenas keep the largest batch's memory for good; the allocator returns it.
    options.enable_cpu_mem_arena = False
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except _LOAD_ERRORS as error:
        raise EngineError(
            f"{path}: ONNX Runtime cannot load it ({str(error).splitlines()[0]}); remove the "
            "engine's folder, the next run builds it anew"
        ) from error
