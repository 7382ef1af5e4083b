"""A store of scenes with carried columns, indexed, made without Ray."""

import dataclasses
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from engine.backends.onnx_cpu import OnnxCpuEncoder
from engine.build import load_or_build
from engine.checkpoint import find_checkpoint
from engine.images import ImageLimits
from engine.preprocess import decode_pixels
from engine.registry import Registry
from jobs.demo.run import CHECKPOINT_DIR
from pipelines import schema
from pipelines.schema import Modality
from pipelines.snapshots import EngineRecord, StoredFile, commit
from pipelines.store import Store
from pipelines.writing import write_table
from tests.catalogs import scene_rows
from tests.stored import PLAN_ID, fingerprint, indexed, make_snapshot

NUM_SCENES = 60
BRANDS = ("acme", "bolt", None)


def carried_columns(num_rows: int) -> dict[str, pa.Array]:
    """Of row i: brand i % 3 (the last is null), price i.5, stock for even i, a day later each."""
    start = datetime(2026, 3, 1, tzinfo=UTC)
    return {
        "brand": pa.array([BRANDS[row % 3] for row in range(num_rows)]).dictionary_encode(),
        "price": pa.array(
            [Decimal(row) + Decimal("0.50") for row in range(num_rows)], pa.decimal128(9, 2)
        ),
        "stock": pa.array([row % 2 == 0 for row in range(num_rows)]),
        "added": pa.array(
            [start + timedelta(days=row) for row in range(num_rows)], pa.timestamp("us", "UTC")
        ),
        "tags": pa.array([["a", str(row)] for row in range(num_rows)]),
        "size": pa.array(range(num_rows), pa.int32()),
    }


def searchable_store(
    folder: Path, *, engines_dir: Path, num_rows: int = NUM_SCENES, integer_keys: bool = False
) -> Path:
    """Images and texts of scenes under the keys k0000, k0001, ..., or 0, 10, 20, ..."""
    store, rows = Store(str(folder)), scene_rows(num_rows)
    registry = Registry(str(engines_dir))
    checkpoint = find_checkpoint(str(CHECKPOINT_DIR), revision=None)
    engine = load_or_build(checkpoint, registry=registry)
    encoder = OnnxCpuEncoder(engine.directory, num_threads=1)
    preprocessing = encoder.manifest.preprocessing
    pixels = [
        decode_pixels(row["image"], preprocessing=preprocessing, limits=ImageLimits())
        for row in rows
    ]
    keys = [10 * row if integer_keys else rows[row]["key"] for row in range(num_rows)]
    record = EngineRecord(
        engine_id=encoder.manifest.engine_id,
        checkpoint=checkpoint.location,
        revision=None,
        weights=encoder.manifest.weights,
    )
    vectors: dict[Modality, Any] = {
        "image": encoder.encode_images(np.stack(pixels)),
        "text": encoder.encode_texts([row["text"] for row in rows]),
    }
    files = [
        _embeddings_file(store, keys, found, modality=modality, engine_id=record.engine_id)
        for modality, found in vectors.items()
    ]
    snapshot = make_snapshot(
        files,
        modalities=("image", "text"),
        embedding_dim=encoder.manifest.embedding_dim,
        key_type="int64" if integer_keys else "string",
    )
    snapshot = dataclasses.replace(snapshot, engine=record)
    indexed(store, snapshot)
    commit(store, snapshot)
    return folder


def _embeddings_file(
    store: Store, keys: list[Any], vectors: Any, *, modality: Modality, engine_id: str
) -> StoredFile:
    carried = carried_columns(len(keys))
    table_schema = schema.embeddings_schema(
        key_type=pa.array(keys).type,
        embedding_dim=vectors.shape[1],
        dtype="float32",
        carried=[pa.field(name, column.type) for name, column in carried.items()],
    )
    table = pa.table(
        {
            schema.KEY: keys,
            schema.MODALITY: [modality] * len(keys),
            schema.EMBEDDING: pa.array(list(vectors), table_schema.field(schema.EMBEDDING).type),
            schema.FINGERPRINT: [fingerprint(str(key)) for key in keys],
            schema.ENGINE_ID: [engine_id] * len(keys),
            **carried,
        },
        schema=table_schema,
    )
    return write_table(table, kind="embeddings", modality=modality, plan_id=PLAN_ID, store=store)
