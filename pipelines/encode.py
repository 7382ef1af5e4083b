"""The encode stage: an actor that loads an engine in its worker and turns batches into embeddings.

Knows nothing of where rows come from or go to.
"""

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from engine.backends.encoder import Encoder
from engine.backends.onnx_cpu import OnnxCpuEncoder
from engine.build import engine_id_of, load_or_build, unquantized_precision
from engine.checkpoint import find_checkpoint
from engine.errors import ClipmillError, EngineError
from engine.registry import Engine, Registry
from pipelines import schema
from pipelines.progress import StageMeter
from pipelines.snapshots import EngineRecord


def ready_engine(record: EngineRecord, *, registry: Registry) -> Engine:
    """Find the very engine that a record names; build it only if it is not there.

    Raises:
        CheckpointError: Its checkpoint cannot be found or built from.
        EngineError: The checkpoint there now gives another engine, or the engine takes more than
            a checkpoint to build.
    """
    found = registry.find(record.engine_id)
    if found is not None:
        return found
    precision = unquantized_precision(record.engine_id)
    if precision is None:
        raise EngineError(
            f"engine {record.engine_id} is not among the engines at {registry.uri}, and a worker "
            "cannot build it: it was calibrated on a catalog. Name with --engines the URI that it "
            "was built under, one that every node reaches, or build it there with "
            "`clipmill engine build`"
        )
    checkpoint = find_checkpoint(record.checkpoint, revision=record.revision)
    engine_id = engine_id_of(checkpoint, precision=precision)
    if engine_id != record.engine_id:
        raise EngineError(
            f"checkpoint {record.checkpoint} gives engine {engine_id} here, "
            f"{record.engine_id} is needed: its files have changed or differ between machines. "
            "Bring the same files back, or embed into another store"
        )
    return load_or_build(checkpoint, registry=registry, precision=precision)


class EncodeStage:
    """Encodes batches of decoded rows. Constructed in the worker, from names and paths."""

    def __init__(
        self,
        *,
        engine: EngineRecord,
        registry: Registry,
        num_threads: int,
        dtype: schema.EmbeddingDtype,
        meter: StageMeter,
    ) -> None:
        """Load the engine, building it first if nobody has.

        What goes wrong is raised by the first call: Ray reports an actor that fails to start only
        as dead, without its error.
        """
        self._error: ClipmillError | None = None
        try:
            directory = ready_engine(engine, registry=registry).directory
            self._encoder: Encoder = OnnxCpuEncoder(directory, num_threads=num_threads)
        except ClipmillError as error:
            self._error = error
        self._dtype = np.dtype(dtype)
        self._meter = meter

    def __call__(self, table: pa.Table) -> pa.Table:
        """Replace `pixels` and `text` by `embedding`, null for rejected rows."""
        if self._error is not None:
            raise self._error
        manifest = self._encoder.manifest
        with self._meter.batch() as size:
            embeddings = np.zeros((table.num_rows, manifest.embedding_dim), dtype=self._dtype)
            has_pixels = table[schema.PIXELS].is_valid().to_numpy()
            if has_pixels.any():
                shape = (manifest.preprocessing.height, manifest.preprocessing.width, 3)
                pixels = pixel_array(table[schema.PIXELS], shape=shape)
                embeddings[has_pixels] = self._encoder.encode_images(pixels)
            has_text = table[schema.TEXT].is_valid().to_numpy()
            if has_text.any():
                texts = table[schema.TEXT].drop_null().to_pylist()
                embeddings[has_text] = self._encoder.encode_texts(texts)
            column = pa.FixedSizeListArray.from_arrays(
                pa.array(embeddings.reshape(-1)),
                manifest.embedding_dim,
                mask=pa.array(~(has_pixels | has_text)),
            )
            size(table.num_rows, 0)
        return table.drop_columns([schema.PIXELS, schema.TEXT]).append_column(
            schema.EMBEDDING, column
        )


def pixel_array(column: Any, *, shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """The valid pixels of a large_binary column as uint8 [N, H, W, 3]; one chunk is not copied."""
    array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    offsets = np.frombuffer(array.buffers()[1], dtype=np.int64)
    offsets = offsets[array.offset : array.offset + len(array) + 1]
    # Nulls take no bytes, so what lies between first and last offset is all valid pixels.
    content = np.frombuffer(array.buffers()[2], dtype=np.uint8)[offsets[0] : offsets[-1]]
    return content.reshape(-1, *shape)
