"""The encode stage: an actor that loads an engine in its worker and turns batches into embeddings.

Knows nothing of where rows come from or go to.
"""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from engine.backends.choice import Backend, load_encoder
from engine.backends.encoder import Encoder
from engine.errors import ClipmillError
from engine.registry import Registry
from pipelines import schema
from pipelines.engines import ready_engine
from pipelines.progress import StageMeter
from pipelines.snapshots import EngineRecord


class EncodeStage:
    """Encodes batches of decoded rows. Constructed in the worker, from names and paths."""

    def __init__(
        self,
        *,
        engine: EngineRecord,
        registry: Registry,
        backend: Backend,
        num_threads: int,
        dtype: schema.EmbeddingDtype,
        meter: StageMeter,
    ) -> None:
        """Load the engine, building it or its plan for this GPU first if nobody has.

        What goes wrong is raised by the first call: Ray reports an actor that fails to start only
        as dead, without its error.
        """
        self._error: ClipmillError | None = None
        try:
            self._encoder: Encoder = load_encoder(
                ready_engine(engine, registry=registry),
                backend=backend,
                registry=registry,
                num_threads=num_threads,
            )
        except ClipmillError as error:
            self._error = error
        self._dtype = np.dtype(dtype)
        self._meter = meter

    def __call__(self, table: pa.Table) -> pa.Table:
        """Replace `pixels` and `text` by `embedding`, null for rejected rows.

        A row that the engine gives no embedding for is rejected here.
        """
        if self._error is not None:
            raise self._error
        manifest = self._encoder.manifest
        with self._meter.batch() as size:
            embeddings = np.zeros((table.num_rows, manifest.embedding_dim), dtype=np.float32)
            has_pixels = table[schema.PIXELS].is_valid().to_numpy()
            if has_pixels.any():
                shape = (manifest.preprocessing.height, manifest.preprocessing.width, 3)
                pixels = pixel_array(table[schema.PIXELS], shape=shape)
                embeddings[has_pixels] = self._encoder.encode_images(pixels)
            has_text = table[schema.TEXT].is_valid().to_numpy()
            if has_text.any():
                texts = table[schema.TEXT].drop_null().to_pylist()
                embeddings[has_text] = self._encoder.encode_texts(texts)
            is_sound = np.isfinite(embeddings).all(axis=1)
            column = pa.FixedSizeListArray.from_arrays(
                pa.array(embeddings.astype(self._dtype).reshape(-1)),
                manifest.embedding_dim,
                mask=pa.array(~((has_pixels | has_text) & is_sound)),
            )
            size(table.num_rows, 0)
        table = table.drop_columns([schema.PIXELS, schema.TEXT])
        if not is_sound.all():
            table = _rejected(table, pa.array(~is_sound))
        return table.append_column(schema.EMBEDDING, column)


def _rejected(table: pa.Table, chosen: pa.BooleanArray) -> pa.Table:
    """The table with these rows as rejects of this stage."""
    for name, value in (
        (schema.STAGE, schema.Stage.ENCODE),
        (schema.REASON, schema.Reason.NOT_ENCODABLE),
        (schema.DETAIL, "the engine gives no unit vector for it; is it beyond 16 bit?"),
    ):
        column = pc.if_else(chosen, pa.scalar(str(value)), table[name])
        table = table.set_column(table.column_names.index(name), name, column)
    return table


def pixel_array(column: Any, *, shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """The valid pixels of a large_binary column as uint8 [N, H, W, 3]; one chunk is not copied."""
    array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    offsets = np.frombuffer(array.buffers()[1], dtype=np.int64)
    offsets = offsets[array.offset : array.offset + len(array) + 1]
    # Nulls take no bytes, so what lies between first and last offset is all valid pixels.
    content = np.frombuffer(array.buffers()[2], dtype=np.uint8)[offsets[0] : offsets[-1]]
    return content.reshape(-1, *shape)
