"""The encode stage: an actor that loads an engine in its worker and turns batches into embeddings.

Knows nothing of where rows come from or go to. Where GPUs decode, JPEGs come here as they are, and
for PyTorch's encoder their pixels never leave the card.
"""

import math
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from engine.backends.choice import Backend, load_encoder
from engine.backends.encoder import Encoder
from engine.decoding.channels import use_all_channels
from engine.decoding.jpegs import Jpegs
from engine.errors import ClipmillError
from engine.images import ImageLimits, ImageRejected
from engine.registry import Registry
from pipelines import metrics, schema
from pipelines.binary_columns import contents, pixel_array
from pipelines.engines import ready_engine
from pipelines.progress import StageMeter, metered
from pipelines.snapshots import EngineRecord

# What is left behind.
_CONTENTS = [schema.PIXELS, schema.ENCODED, schema.GEOMETRY, schema.TEXT]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Images:
    """Those of a batch, decoded."""

    rows: NDArray[np.int64]
    """[n] of the batch: first those that came encoded."""
    pixels: Any
    """Of them: uint8 [n, H, W, 3], on the GPU if some came encoded and the encoder takes them; None
    if the batch has no image."""
    rejected: Mapping[int, ImageRejected]
    """Row -> why it is no usable image."""
    num_encoded: int
    """That came encoded."""
    decoded_bytes: int
    """Of pixels that those became."""
    card_seconds: float
    """That the card took to decode them."""


class EncodeStage:
    """Encodes batches of decoded rows. Constructed in the worker, from names and paths.

    Several threads may call it: while some batches are encoded, the next are decoded.
    """

    def __init__(
        self,
        *,
        engine: EngineRecord,
        registry: Registry,
        backend: Backend,
        decoder: schema.Decoder,
        limits: ImageLimits,
        num_threads: int,
        dtype: schema.EmbeddingDtype,
        meter: StageMeter | None,
        decode_meter: StageMeter | None,
    ) -> None:
        """Load the engine, building it or its plan for this GPU first if nobody has.

        What goes wrong is raised by the first call: Ray reports an actor that fails to start only
        as dead, without its error.
        """
        self._error: ClipmillError | None = None
        self._decoder: Any = None
        if decoder == "gpu":
            use_all_channels()  # before anything starts CUDA
        started = time.monotonic()
        try:
            self._encoder: Encoder = load_encoder(
                ready_engine(engine, registry=registry),
                backend=backend,
                registry=registry,
                num_threads=num_threads,
            )
            self._encoding = threading.Semaphore(self._encoder.max_calls)
            if decoder == "gpu":
                # torch and Triton are heavy; workers that decode nothing do without.
                from engine.decoding.gpu_decoder import GpuDecoder

                self._decoder = GpuDecoder(
                    self._encoder.manifest.preprocessing, limits=limits, num_threads=num_threads
                )
            if meter is not None:
                meter.add(metrics.ENGINE_LOADS, 1, {})
                meter.add(metrics.ENGINE_LOAD_SECONDS, time.monotonic() - started, {})
        except ClipmillError as error:
            self._error = error
        # PyTorch's encoder takes pixels where they are, others from host memory.
        self._takes_gpu_pixels = backend == "torch"
        self._dtype = np.dtype(dtype)
        self._meter, self._decode_meter = meter, decode_meter

    def check(self) -> None:
        """Raise what loading the engine met: the call does so, where it reaches the driver."""
        if self._error is not None:
            raise self._error

    def __call__(self, table: pa.Table) -> pa.Table:
        """Replace `pixels`, `encoded` and `text` by `embedding`, null for rejected rows.

        An image that cannot be decoded, and a row that the engine gives no embedding for, are
        rejected here.
        """
        self.check()
        manifest = self._encoder.manifest
        images = self._images(table)
        embeddings = np.zeros((table.num_rows, manifest.embedding_dim), dtype=np.float32)
        has_text = table[schema.TEXT].is_valid().to_numpy()
        with self._encoding, metered(self._meter) as size:
            if len(images.rows):
                embeddings[images.rows] = self._encoder.encode_images(images.pixels)
            if has_text.any():
                texts = table[schema.TEXT].drop_null().to_pylist()
                embeddings[has_text] = self._encoder.encode_texts(texts)
            size(table.num_rows, 0)
        if self._decode_meter is not None and images.num_encoded:
            # Not before: of a process that dies as it encodes, neither is done.
            self._decode_meter.count(images.num_encoded, images.decoded_bytes, images.card_seconds)
        if self._meter is not None:
            for modality, num_rows in (("image", len(images.rows)), ("text", int(has_text.sum()))):
                self._meter.add(metrics.ENCODED, num_rows, {"modality": modality})
        is_sound = np.isfinite(embeddings).all(axis=1)
        is_encoded = has_text.copy()
        is_encoded[images.rows] = True
        column = pa.FixedSizeListArray.from_arrays(
            pa.array(embeddings.astype(self._dtype).reshape(-1)),
            manifest.embedding_dim,
            mask=pa.array(~(is_encoded & is_sound)),
        )
        table = table.drop_columns(_CONTENTS)
        if images.rejected:
            table = _rejected_images(table, images.rejected)
        if not is_sound.all():
            table = _rejected(
                table,
                np.logical_not(is_sound),
                stage=schema.Stage.ENCODE,
                reason=schema.Reason.NOT_ENCODABLE,
                detail="the engine gives no unit vector for it; is it beyond 16 bit?",
            )
        return table.append_column(schema.EMBEDDING, column)

    def _images(self, table: pa.Table) -> _Images:
        """All images as one batch for the encoder; what is still encoded is decoded."""
        preprocessing = self._encoder.manifest.preprocessing
        shape = (preprocessing.height, preprocessing.width, 3)
        ready = np.flatnonzero(table[schema.PIXELS].is_valid().to_numpy())
        pixels = pixel_array(table[schema.PIXELS], shape=shape) if len(ready) else None
        rows = np.flatnonzero(table[schema.ENCODED].is_valid().to_numpy())
        if len(rows) == 0:
            return _Images(
                rows=ready,
                pixels=pixels,
                rejected={},
                num_encoded=0,
                decoded_bytes=0,
                card_seconds=0.0,
            )
        content, bounds = contents(table[schema.ENCODED])
        geometries = table[schema.GEOMETRY].combine_chunks().flatten().to_numpy().astype(np.int64)
        jpegs = Jpegs(content=content, bounds=bounds, geometries=geometries.reshape(len(rows), -1))
        decoded = self._decoder.decode(jpegs, beside=pixels)
        return _Images(
            rows=np.concatenate([rows[decoded.rows], ready]),
            pixels=decoded.pixels if self._takes_gpu_pixels else decoded.pixels.cpu().numpy(),
            rejected={int(rows[row]): verdict for row, verdict in decoded.rejected.items()},
            num_encoded=len(rows),
            decoded_bytes=len(decoded.rows) * math.prod(shape),
            card_seconds=decoded.card_seconds,
        )


def embedding_type(*, embedding_dim: int, dtype: schema.EmbeddingDtype) -> pa.DataType:
    """Of the column that the stage adds."""
    return pa.list_(pa.from_numpy_dtype(np.dtype(dtype)), embedding_dim)


def unencodable(table: pa.Table, causes: Mapping[int, str], *, type_: pa.DataType) -> pa.Table:
    """Rows that cannot be encoded without harm, as the stage would give them: as rejects.

    Args:
        table: As the stage takes it.
        causes: Row of it -> what it did.
        type_: See `embedding_type`.
    """
    rows = table.drop_columns(_CONTENTS).take(pa.array(causes, pa.int64()))
    for row, cause in enumerate(causes.values()):
        rows = _rejected(
            rows,
            np.arange(rows.num_rows) == row,
            stage=schema.Stage.ENCODE,
            reason=schema.Reason.POISON,
            detail=f"a process that encoded it alone {cause}",
        )
    return rows.append_column(schema.EMBEDDING, pa.nulls(rows.num_rows, type_))


def _rejected_images(table: pa.Table, verdicts: Mapping[int, ImageRejected]) -> pa.Table:
    for row, verdict in verdicts.items():
        chosen = np.arange(table.num_rows) == row
        table = _rejected(
            table,
            chosen,
            stage=schema.Stage.DECODE,
            reason=verdict.reason,
            detail=verdict.detail,
        )
    return table


def _rejected(
    table: pa.Table, chosen: NDArray[np.bool_], *, stage: schema.Stage, reason: str, detail: str
) -> pa.Table:
    """The table with these rows as rejects."""
    for name, value in (
        (schema.STAGE, stage),
        (schema.REASON, reason),
        (schema.DETAIL, detail),
    ):
        column = pc.if_else(pa.array(chosen), pa.scalar(str(value)), table[name])
        table = table.set_column(table.column_names.index(name), name, column)
    return table
