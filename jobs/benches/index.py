"""Measures indexing: a build and an update of 1 % of the rows, in time, memory and recall.

Knows nothing of how it is done: each is `clipmill index`, the whole command, on a store of vectors
like CLIP's that is made for it.
"""

import dataclasses
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from jobs.benches.clip_like import ClipLike, Vectors, clip_like
from jobs.benches.programs import run_watched
from pipelines import schema
from pipelines.indexes.recall import CHOSEN_K
from pipelines.schema import Modality
from pipelines.snapshots import CatalogRecord, EngineRecord, Snapshot, StoredFile, commit
from pipelines.store import Store
from pipelines.stored_samples import vectors_of
from pipelines.writing import write_table

NUM_FILES = 20
# Of the store, to draw queries from.
NUM_TEXTS = 4096
_ENGINE = EngineRecord(engine_id="0" * 16, checkpoint="vectors at random", revision=None)
_PLAN_ID = "bench"


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexBenchConfig:
    """What is measured."""

    num_rows: int
    """Images."""
    embedding_dim: int
    """D."""
    words: tuple[str, ...] = ()
    """Options of `clipmill index`, besides its store."""
    changed_share: float = 0.01
    """Of the rows: half of these have another vector, a quarter goes, and a quarter is new."""

    def __post_init__(self) -> None:
        """Check the bounds."""
        if self.num_rows < NUM_FILES:
            raise ValueError(f"num_rows={self.num_rows}: expected at least {NUM_FILES}")
        if not 0 < self.changed_share < 1:
            raise ValueError(f"changed_share={self.changed_share}: expected between 0 and 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexFigures:
    """One run of `clipmill index`."""

    name: str
    """What was done to the store before it."""
    seconds: float
    """The whole command."""
    peak_memory_bytes: int
    """Proportional set size, mapped pages included."""
    factory: str
    """FAISS's name of the type."""
    reason: str
    """Why."""
    memory_bytes: int
    """What a search wants in memory."""
    recall: dict[str, float]
    """Kind of queries -> recall@10 at the setting of searches."""
    search_seconds: dict[str, float]
    """Kind of queries -> median of a search on one thread."""


def measure_index(config: IndexBenchConfig) -> list[IndexFigures]:
    """Make a store, index it, change some rows, index it again.

    Raises:
        ClipmillError: A command failed.
    """
    with tempfile.TemporaryDirectory(prefix="clipmill-bench-") as scratch:
        store = Store(f"{scratch}/store")
        words = ["-m", "jobs.cli", "index", "--store", store.uri, "--json", *config.words]
        vectors = clip_like(num_rows=config.num_rows, embedding_dim=config.embedding_dim)
        snapshot = _first(store, vectors, config)
        commit(store, snapshot)
        figures = [_figures("first", words)]
        commit(store, _changed(store, snapshot, vectors, config))
        share = f"{config.changed_share:.0%} changed"
        return [*figures, _figures(share, words)]


def index_lines(figures: Sequence[IndexFigures]) -> list[str]:
    """A table of the runs."""
    lines = [
        f"{'':<12} {'seconds':>8} {'MiB at most':>12} {'MiB searched':>13} {'queries':>8} "
        f"{'recall@10':>10} {'ms':>6}"
    ]
    for run in figures:
        for kind, recall in run.recall.items():
            lines.append(
                f"{run.name:<12} {run.seconds:>8.1f} {run.peak_memory_bytes / 2**20:>12,.0f} "
                f"{run.memory_bytes / 2**20:>13,.0f} {kind:>8} {recall:>10.3f} "
                f"{run.search_seconds[kind] * 1e3:>6.2f}"
            )
        lines.append(f"  {run.factory}: {run.reason}")
    return lines


def _figures(name: str, words: Sequence[str]) -> IndexFigures:
    run = run_watched(words)
    # Of images; that of texts is there for its queries.
    manifest = next(entry for entry in run.report if entry["modality"] == "image")
    chosen = [entry for entry in manifest["measured"] if entry["setting"] == manifest["setting"]]
    return IndexFigures(
        name=name,
        seconds=run.seconds,
        peak_memory_bytes=run.peak_memory_bytes,
        factory=manifest["factory"],
        reason=manifest["reason"],
        memory_bytes=manifest["memory_bytes"],
        recall={entry["kind"]: entry["recall"][str(CHOSEN_K)] for entry in chosen},
        search_seconds={entry["kind"]: entry["search_seconds"] for entry in chosen},
    )


def _first(store: Store, vectors: ClipLike, config: IndexBenchConfig) -> Snapshot:
    rng = np.random.default_rng(1)
    per_file = -(-config.num_rows // NUM_FILES)
    files = []
    for first in range(0, config.num_rows, per_file):
        rows = range(first, min(first + per_file, config.num_rows))
        files.append(_write(store, "image", rows, vectors.images(len(rows), rng=rng)))
    num_texts = min(NUM_TEXTS, config.num_rows)
    files.append(_write(store, "text", range(num_texts), vectors.texts(num_texts, rng=rng)))
    return Snapshot(
        number=1,
        parent=None,
        created_at="2026-01-01T00:00:00+00:00",
        run_id="bench",
        engine=_ENGINE,
        catalog=CatalogRecord(
            uri="", num_rows=config.num_rows, num_keys=config.num_rows, columns={}, files={}
        ),
        key_type="string",
        embedding_dim=config.embedding_dim,
        embedding_dtype="float16",
        modalities=("image", "text"),
        files=tuple(files),
    )


def _changed(
    store: Store, before: Snapshot, vectors: ClipLike, config: IndexBenchConfig
) -> Snapshot:
    """The same but for one file, with as many rows."""
    num = max(4, int(config.num_rows * config.changed_share))
    num_changed, num_gone = num // 2, num // 4
    rng = np.random.default_rng(2)
    images = before.files_of("embeddings", modality="image")
    kept, changed = images[:-1], images[-1]
    first, end = config.num_rows - changed.num_rows, config.num_rows
    # Of the file's rows the first go, the next have another vector, and the last are new.
    rows = [*range(first + num_gone, end), *range(end, end + num_gone)]
    new = np.concatenate(list(vectors.images(num_changed + num_gone, rng=rng)))
    with store.open(changed.path) as file:
        old = _stored_vectors(file, num_skipped=num_gone + num_changed)
    contents = [1] * num_changed + [0] * len(old) + [1] * num_gone
    parts = iter([new[:num_changed], old, new[num_changed:]])
    written = _write(store, "image", rows, parts, versions=contents)
    texts = before.files_of("embeddings", modality="text")
    files = (*kept, written, *texts)
    return dataclasses.replace(before, number=2, parent=1, files=files)


def _stored_vectors(file: BinaryIO, *, num_skipped: int) -> Vectors:
    return vectors_of(pq.read_table(file, columns=[schema.EMBEDDING]).slice(num_skipped))


def _write(
    store: Store,
    modality: Modality,
    rows: Sequence[int],
    parts: Iterator[Vectors],
    *,
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
            schema.ENGINE_ID: [_ENGINE.engine_id] * len(keys),
        },
        schema=table_schema,
    )
    return write_table(table, kind="embeddings", modality=modality, plan_id=_PLAN_ID, store=store)
