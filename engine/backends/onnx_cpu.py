"""Runs an engine's ONNX towers on the CPU with ONNX Runtime.

Knows nothing of how the engine was built or where its inputs come from.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnxruntime
import onnxruntime.capi.onnxruntime_pybind11_state as runtime_errors
from numpy.typing import NDArray
from tokenizers import Tokenizer

from engine.errors import EngineError
from engine.manifest import IMAGE_ONNX, TEXT_ONNX, TOKENIZER_FILE, read_manifest

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


class OnnxCpuEncoder:
    """An `Encoder` on CPU cores, float32."""

    def __init__(self, engine_dir: Path, *, num_threads: int) -> None:
        """Load the towers.

        Args:
            engine_dir: The engine's folder, as `registry.load_or_build` leaves it.
            num_threads: Threads within one operator.

        Raises:
            EngineError: The folder holds no whole engine.
        """
        self.manifest = read_manifest(engine_dir)
        self._image = _session(engine_dir / IMAGE_ONNX, num_threads=num_threads)
        if self.manifest.text is not None:
            self._text = _session(engine_dir / TEXT_ONNX, num_threads=num_threads)
            self._tokenizer = _tokenizer(engine_dir / TOKENIZER_FILE)

    def encode_images(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Pixels uint8 [N, H, W, 3], RGB, HWC -> float32 [N, D], unit norm."""
        preprocessing = self.manifest.preprocessing
        expected = (preprocessing.height, preprocessing.width, 3)
        if pixels.shape[1:] != expected or pixels.dtype != np.uint8:
            raise ValueError(
                f"pixels are {pixels.dtype} {list(pixels.shape)}, the engine takes "
                f"uint8 [N, {', '.join(map(str, expected))}]"
            )
        return self._in_calls(
            len(pixels), lambda rows: self._image.run(None, {"pixels": pixels[rows]})[0]
        )

    def encode_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Texts -> float32 [N, D], unit norm; a text beyond the token length is cut."""
        text = self.manifest.text
        if text is None:
            raise EngineError(
                f"engine {self.manifest.engine_id} of {self.manifest.checkpoint} has no text tower"
            )
        rows = [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))]
        # Rows of like length go together, so that few are padded much.
        order = np.argsort([len(ids) for ids in rows], kind="stable")

        def encode(called: slice) -> NDArray[np.float32]:
            ids = [rows[row] for row in order[called]]
            padded = np.full((len(ids), len(ids[-1])), text.pad_token_id, dtype=np.int32)
            for line, row in zip(padded, ids, strict=True):
                line[: len(row)] = row
            embeddings: NDArray[np.float32] = self._text.run(None, {"token_ids": padded})[0]
            return embeddings

        embeddings = np.empty((len(rows), self.manifest.embedding_dim), dtype=np.float32)
        embeddings[order] = self._in_calls(len(rows), encode)
        return embeddings

    def _in_calls(
        self, num_rows: int, encode: Callable[[slice], NDArray[np.float32]]
    ) -> NDArray[np.float32]:
        embeddings = np.empty((num_rows, self.manifest.embedding_dim), dtype=np.float32)
        for first in range(0, num_rows, ROWS_PER_CALL):
            rows = slice(first, min(first + ROWS_PER_CALL, num_rows))
            embeddings[rows] = encode(rows)
        return embeddings


def _tokenizer(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:
        raise EngineError(
            f"{path}: cannot be loaded ({error}); remove the engine's folder, the next run builds "
            "it anew"
        ) from error


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
