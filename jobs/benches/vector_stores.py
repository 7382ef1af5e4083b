"""Makes stores of vectors like CLIP's, and changes some of their rows, without catalog or model.

Knows nothing of who measures what with them.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import xxhash

from jobs.benches.clip_like import Vectors, clip_like
from pipelines import schema
from pipelines.arrow_files import read_parquet
from pipelines.guarding.stored_samples import vectors_of
from pipelines.schema import Modality
from pipelines.snapshots import CatalogRecord, EngineRecord, Snapshot, StoredFile, commit
from pipelines.store import Store
from pipelines.writing import write_table

NUM_FILES = 20
# Of the store, to draw queries from.
NUM_TEXTS = 4096
UNKNOWN_ENGINE = EngineRecord(engine_id="0" * 16, checkpoint="vectors at random", revision=None)
_PLAN_ID = "bench"


def make_store(
    store: Store, *, num_rows: int, embedding_dim: int, engine: EngineRecord = UNKNOWN_ENGINE
) -> Snapshot:
    """Commit a first snapshot of so many images, and of texts to draw queries from."""
    vectors = clip_like(num_rows=num_rows, embedding_dim=embedding_dim)
    rng = np.random.default_rng(1)
    per_file = -(-num_rows // NUM_FILES)
    files = []
    for first in range(0, num_rows, per_file):
        rows = range(first, min(first + per_file, num_rows))
        parts = vectors.images(len(rows), rng=rng)
        files.append(_write(store, "image", rows, parts, engine=engine))
    num_texts = min(NUM_TEXTS, num_rows)
    parts = vectors.texts(num_texts, rng=rng)
    files.append(_write(store, "text", range(num_texts), parts, engine=engine))
    snapshot = Snapshot(
        number=1,
        parent=None,
        created_at="2026-01-01T00:00:00+00:00",
        run_id="bench",
        engine=engine,
        catalog=CatalogRecord(uri="", num_rows=num_rows, num_keys=num_rows, columns={}, files={}),
        key_type="string",
        embedding_dim=embedding_dim,
        embedding_dtype="float16",
        modalities=("image", "text"),
        files=tuple(files),
    )
    commit(store, snapshot)
    return snapshot


def num_changes(num_rows: int, *, changed_share: float) -> tuple[int, int]:
    """How many rows have another vector, and how many go, which as many new ones come for."""
    num = max(4, int(num_rows * changed_share))
    return num // 2, num // 4


def rows_of_last_file(num_rows: int) -> int:
    """Of the images: those that can change or go."""
    per_file = -(-num_rows // NUM_FILES)
    return num_rows - (-(-num_rows // per_file) - 1) * per_file


def change_store(store: Store, before: Snapshot, *, changed_share: float) -> Snapshot:
    """Commit a snapshot that is the same but for one file, with as many rows.

    Of the share of the rows half have another vector, a quarter goes, and a quarter is new.
    """
    num_rows = before.num_rows("embeddings", modality="image")
    vectors = clip_like(num_rows=num_rows, embedding_dim=before.embedding_dim)
    num_changed, num_gone = num_changes(num_rows, changed_share=changed_share)
    rng = np.random.default_rng(2)
    images = before.files_of("embeddings", modality="image")
    kept, changed = images[:-1], images[-1]
    first, end = num_rows - changed.num_rows, num_rows
    # Of the file's rows the first go, the next have another vector, and the last are new.
    rows = [*range(first + num_gone, end), *range(end, end + num_gone)]
    new = np.concatenate(list(vectors.images(num_changed + num_gone, rng=rng)))
    with store.open(changed.path) as file:
        old = stored_vectors(file)[num_gone + num_changed :]
    contents = [1] * num_changed + [0] * len(old) + [1] * num_gone
    parts = iter([new[:num_changed], old, new[num_changed:]])
    written = _write(store, "image", rows, parts, engine=before.engine, versions=contents)
    texts = before.files_of("embeddings", modality="text")
    files = (*kept, written, *texts)
    snapshot = replace(before, number=before.number + 1, parent=before.number, files=files)
    commit(store, snapshot)
    return snapshot


def stored_vectors(file: BinaryIO) -> Vectors:
    """The embeddings float32 [N, D] of a file."""
    return vectors_of(read_parquet(file, columns=[schema.EMBEDDING]))


def _write(
    store: Store,
    modality: Modality,
    rows: Sequence[int],
    parts: Iterator[Vectors],
    *,
    engine: EngineRecord,
    versions: Iterable[int] | None = None,
) -> StoredFile:
    vectors = np.concatenate(list(parts)).astype(np.float16)
    keys = [f"item-{row:010d}" for row in rows]
    of_rows = zip(keys, versions or [0] * len(keys), strict=True)
    table_schema = schema.embeddings_schema(
        key_type=pa.string(), embedding_dim=vectors.shape[1], dtype="float16"
    )
    table = pa.table(
        {
            schema.KEY: keys,
            schema.MODALITY: [modality] * len(keys),
            schema.EMBEDDING: pa.FixedSizeListArray.from_arrays(
                pa.array(vectors.reshape(-1)), type=table_schema.field(schema.EMBEDDING).type
            ),
            schema.FINGERPRINT: pa.array(
                [xxhash.xxh3_128_digest(f"{key} {version}".encode()) for key, version in of_rows],
                schema.FINGERPRINT_TYPE,
            ),
            schema.ENGINE_ID: [engine.engine_id] * len(keys),
        },
        schema=table_schema,
    )
    return write_table(table, kind="embeddings", modality=modality, plan_id=_PLAN_ID, store=store)
