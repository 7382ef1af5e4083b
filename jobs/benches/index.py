"""Measures indexing: a build and an update of 1 % of the rows, in time, memory and recall.

Knows nothing of how it is done: each is `clipmill index`, the whole command, on a store of vectors
like CLIP's that is made for it; and beside it what autofaiss makes of the same vectors.
"""

import dataclasses
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from jobs.benches.clip_like import ClipLike, Vectors, clip_like
from jobs.benches.programs import run_watched
from pipelines import schema
from pipelines.indexes.manifest import find_index, indexed_files
from pipelines.indexes.opening import TRUTH_FILE
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
    memory_bytes: int = 2**30
    """What a search may want in memory."""
    words: tuple[str, ...] = ()
    """More options of `clipmill index`."""
    changed_share: float = 0.01
    """Of the rows: half of these have another vector, a quarter goes, and a quarter is new."""
    autofaiss_python: str | None = None
    """A Python that has autofaiss, to be measured beside it; None: it is not."""

    def __post_init__(self) -> None:
        """Check the bounds."""
        if self.num_rows < NUM_FILES:
            raise ValueError(f"num_rows={self.num_rows}: expected at least {NUM_FILES}")
        if not 0 < self.changed_share < 1:
            raise ValueError(f"changed_share={self.changed_share}: expected between 0 and 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class SettingFigures:
    """Searches at one setting."""

    kind: str
    """Of queries: image or text."""
    setting: int
    """Lists that are visited; of autofaiss, the milliseconds that it chose its parameters for."""
    recall: float
    """Of the 10 nearest."""
    search_seconds: float
    """Of one, the median, on one thread."""


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexFigures:
    """An index that was made."""

    name: str
    """What was done to the store before it, or by what it was made."""
    seconds: float
    """The whole command; of autofaiss, the build alone."""
    peak_memory_bytes: int
    """Proportional set size, mapped pages included."""
    factory: str
    """FAISS's name of the type."""
    reason: str
    """Why."""
    setting: int | None
    """That searches will have; None: whichever of them."""
    measured: tuple[SettingFigures, ...]
    """All that were tried."""


def measure_index(config: IndexBenchConfig) -> list[IndexFigures]:
    """Make a store, index it, change some rows, index it again.

    Raises:
        ClipmillError: A command failed.
    """
    with tempfile.TemporaryDirectory(prefix="clipmill-bench-") as scratch:
        store = Store(f"{scratch}/store")
        words = ["-m", "jobs.cli", "index", "--store", store.uri, "--json"]
        words += ["--max-memory-bytes", str(config.memory_bytes), *config.words]
        vectors = clip_like(num_rows=config.num_rows, embedding_dim=config.embedding_dim)
        snapshot = _first(store, vectors, config)
        commit(store, snapshot)
        figures = [_figures("first", words)]
        if config.autofaiss_python is not None:
            figures.append(
                _of_autofaiss(store, snapshot, config, scratch=Path(scratch) / "autofaiss")
            )
        commit(store, _changed(store, snapshot, vectors, config))
        share = f"{config.changed_share:.0%} changed"
        return [*figures, _figures(share, words)]


def index_lines(figures: Sequence[IndexFigures]) -> list[str]:
    """A table of the runs; the setting of searches is marked."""
    lines = []
    for run in figures:
        lines.append(
            f"{run.name}: {run.seconds:,.1f} s, {run.peak_memory_bytes / 2**20:,.0f} MiB at most, "
            f"{run.factory}: {run.reason}"
        )
        lines.append(f"{'setting':>9} {'queries':>8} {'recall@10':>10} {'ms':>7}")
        for found in run.measured:
            mark = "*" if found.setting == run.setting else " "
            lines.append(
                f"{mark}{found.setting:>8,} {found.kind:>8} {found.recall:>10.3f} "
                f"{found.search_seconds * 1e3:>7.2f}"
            )
    return lines


def _figures(name: str, words: Sequence[str]) -> IndexFigures:
    run = run_watched(words)
    # Of images; that of texts is there for its queries.
    manifest = next(entry for entry in run.report if entry["modality"] == "image")
    return IndexFigures(
        name=name,
        seconds=run.seconds,
        peak_memory_bytes=run.peak_memory_bytes,
        factory=manifest["factory"],
        reason=manifest["reason"],
        setting=manifest["setting"],
        measured=tuple(
            SettingFigures(
                kind=entry["kind"],
                setting=entry["setting"],
                recall=entry["recall"][str(CHOSEN_K)],
                search_seconds=entry["search_seconds"],
            )
            for entry in manifest["measured"]
        ),
    )


def _of_autofaiss(
    store: Store, snapshot: Snapshot, config: IndexBenchConfig, *, scratch: Path
) -> IndexFigures:
    """An index by autofaiss of the vectors that another was built of, asked the same."""
    assert config.autofaiss_python is not None
    manifest = find_index(store, snapshot, modality="image")
    assert manifest is not None
    (scratch / "vectors").mkdir(parents=True)
    shutil.copy(Path(store.full_path(manifest.folder)) / TRUTH_FILE, scratch / "queries.npz")
    for number, file in enumerate(indexed_files(snapshot, modality="image")):
        with store.open(file.path) as opened:
            vectors = _stored_vectors(opened, num_skipped=0)
        np.save(scratch / "vectors" / f"{number:05d}.npy", vectors)
    program = str(Path(__file__).with_name("autofaiss_program.py"))
    run = run_watched(
        [program, str(scratch), str(config.memory_bytes)], python=config.autofaiss_python
    )
    return IndexFigures(
        name="autofaiss",
        seconds=run.report["seconds"],
        peak_memory_bytes=run.peak_memory_bytes,
        factory=run.report["factory"],
        reason="chosen by it",
        setting=None,
        measured=tuple(SettingFigures(**entry) for entry in run.report["measured"]),
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
