"""Stores made by hand, with embeddings that a test knows."""

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines import schema
from pipelines.indexes.manifest import IndexManifest, MeasuredRecall
from pipelines.indexes.options import IndexOptions
from pipelines.indexing import check_recall, index_snapshot
from pipelines.schema import EmbeddingDtype, Modality
from pipelines.snapshots import CatalogRecord, EngineRecord, Snapshot, StoredFile, commit
from pipelines.store import Store
from pipelines.writing import write_table

ENGINE_ID = "0123456789abcdef"
PLAN_ID = "plan"
Vectors = Mapping[str | int, Sequence[float] | NDArray[np.float32]]


def fingerprint(content: str) -> bytes:
    """16 bytes that are readable in a failure."""
    return content.encode().ljust(16, b".")[:16]


def embeddings_file(
    store: Store,
    vectors: Vectors,
    *,
    modality: Modality = "image",
    dtype: EmbeddingDtype = "float32",
    plan_id: str = PLAN_ID,
    fingerprints: Sequence[bytes] | None = None,
) -> StoredFile:
    """Write one file of embeddings, in the order given."""
    table_schema = schema.embeddings_schema(
        key_type=pa.array(list(vectors)).type,
        embedding_dim=len(next(iter(vectors.values()))),
        dtype=dtype,
    )
    table = pa.table(
        {
            schema.KEY: list(vectors),
            schema.MODALITY: [modality] * len(vectors),
            schema.EMBEDDING: pa.array(
                [np.asarray(vector, dtype=dtype) for vector in vectors.values()],
                table_schema.field(schema.EMBEDDING).type,
            ),
            schema.FINGERPRINT: fingerprints or [fingerprint(str(key)) for key in vectors],
            schema.ENGINE_ID: [ENGINE_ID] * len(vectors),
        },
        schema=table_schema,
    )
    return write_table(table, kind="embeddings", modality=modality, plan_id=plan_id, store=store)


def make_snapshot(
    files: Sequence[StoredFile],
    *,
    number: int = 1,
    modalities: tuple[Modality, ...] = ("image",),
    embedding_dim: int = 4,
    key_type: str = "string",
    dtype: EmbeddingDtype = "float32",
) -> Snapshot:
    """A snapshot of these files."""
    return Snapshot(
        number=number,
        parent=number - 1 or None,
        created_at="2026-03-01T10:00:00+00:00",
        run_id="20260301T100000-abcdef",
        engine=EngineRecord(engine_id=ENGINE_ID, checkpoint="acme/clip", revision="main"),
        catalog=CatalogRecord(
            uri="catalog",
            num_rows=9,
            num_keys=8,
            columns={"key": "key", "image": "image", "text": None, "version": None},
            files={"catalog/a.parquet": "10-1"},
        ),
        key_type=key_type,
        embedding_dim=embedding_dim,
        embedding_dtype=dtype,
        modalities=modalities,
        files=tuple(files),
    )


def commit_vectors(
    store: Store, *, number: int = 1, dtype: EmbeddingDtype = "float32", **files: Sequence[Vectors]
) -> Snapshot:
    """Commit a snapshot of `image=[...]` and `text=[...]`, each a list of files."""
    stored = [
        embeddings_file(store, vectors, modality=modality, dtype=dtype)
        for modality, parts in files.items()
        for vectors in parts
    ]
    first = next(part for parts in files.values() for part in parts)
    snapshot = make_snapshot(
        stored,
        number=number,
        modalities=tuple(modality for modality in schema.MODALITIES if modality in files),
        embedding_dim=len(next(iter(first.values()))),
        key_type=str(pa.array(list(first)).type),
        dtype=dtype,
    )
    commit(store, snapshot)
    return snapshot


def indexed(store: Store, snapshot: Snapshot) -> list[IndexManifest]:
    """Index a snapshot as `clipmill index` does, committed or not."""
    return index_snapshot(store, snapshot, options=IndexOptions(), promote=check_recall)


def index_manifest(**recalls: float) -> IndexManifest:
    """An index that finds so much of each kind of queries; more of each at a larger setting."""
    measured = [
        MeasuredRecall(
            kind=kind,
            setting=setting,
            num_queries=512,
            recall={"1": 1.0, "10": found + (setting - 4) / 1000, "100": 0.0},
            search_seconds=setting / 4000,
        )
        for setting in (4, 8)
        for kind, found in recalls.items()
    ]
    return IndexManifest(
        index_id="0" * 32,
        build_id="0" * 16,
        engine_id=ENGINE_ID,
        modality="image",
        num_rows=700,
        num_ids=700,
        embedding_dim=16,
        kind="ivf",
        factory="IVF64,SQ8",
        reason="asked for, and <so> on",
        memory_bytes=1,
        setting=4,
        min_recall=0.95,
        measured=tuple(measured),
        num_trained_rows=700,
        num_changed_rows=0,
    )
