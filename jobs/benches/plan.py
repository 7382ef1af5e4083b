"""Measures how long it takes to find what changed in a large catalog, and in how much memory.

Knows nothing of embedding. Catalog and store are made for it: keys and versions of rows, of which
some changed, a few went and a few came; the store's files are as many as a run writes, and their
embeddings, which no plan reads, are short.
"""

import os
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from engine.errors import ClipmillError
from jobs.benches.memory import MemoryWatch
from pipelines import schema
from pipelines.catalog import CatalogConfig, open_catalog
from pipelines.cluster.resources import Resources
from pipelines.fingerprints import row_fingerprints
from pipelines.ledger import Ledger
from pipelines.planning import catalog_record, fill
from pipelines.snapshots import EngineRecord, Snapshot, StoredFile, commit, current_snapshot
from pipelines.store import Store

NUM_FILES = 20  # of the catalog
ROWS_PER_GROUP = 100_000
EMBEDDING_DIM = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanConfig:
    """What is measured."""

    num_keys: int
    """Of the catalog."""
    changed_share: float = 0.01
    """Of the keys: they have a new version; a tenth of that share went, and as many came."""

    def __post_init__(self) -> None:
        """Check the bounds."""
        if self.num_keys < NUM_FILES:
            raise ValueError(f"num_keys={self.num_keys}: expected at least {NUM_FILES}")
        if not 0 <= self.changed_share <= 1:
            raise ValueError(f"changed_share={self.changed_share}: expected 0 to 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanFigures:
    """One plan."""

    num_keys: int
    """Of the catalog."""
    num_due: int
    """Changed and new."""
    num_dead: int
    """Stored, and changed or gone."""
    seconds: float
    """From two folders of files to the rows to be read."""
    core_seconds: float
    """Of all its threads: what it takes of cores, whatever else runs on them."""
    peak_memory_bytes: int
    """Of the process, what made the folders included."""


def measure_plan(config: PlanConfig) -> PlanFigures:
    """Make a catalog and a store, and plan.

    Raises:
        ClipmillError: The plan is not what was made.
    """
    num_changed = int(config.num_keys * config.changed_share)
    num_gone = num_changed // 10
    with tempfile.TemporaryDirectory(prefix="clipmill-bench-") as scratch:
        folder = Path(scratch)
        _make(folder, num_keys=config.num_keys, num_changed=num_changed, num_gone=num_gone)
        with MemoryWatch(os.getpid()) as watch:
            started, core_started = time.perf_counter(), time.process_time()
            store = Store(str(folder / "store"))
            catalog = open_catalog(_catalog_config(folder))
            parent = current_snapshot(store)
            assert parent is not None
            with Ledger(key_type=catalog.key_type, modalities=catalog.modalities) as ledger:
                fill(ledger, catalog, parent=parent, staged=(), store=store, num_cpus=1)
                counts = ledger.counts().keys["text"]
                num_due = sum(len(rows.rows) for rows in ledger.due())
                num_live = sum(ledger.num_live_by_path().values())
            seconds = time.perf_counter() - started
            core_seconds = time.process_time() - core_started
    figures = PlanFigures(
        num_keys=config.num_keys,
        num_due=num_due,
        num_dead=parent.num_rows("embeddings") - num_live,
        seconds=seconds,
        core_seconds=core_seconds,
        peak_memory_bytes=watch.peak_bytes,
    )
    is_counted = (counts.num_changed, counts.num_new, counts.num_deleted) == (
        num_changed,
        num_gone,
        num_gone,
    )
    if not (is_counted and num_due == figures.num_dead == num_changed + num_gone):
        raise ClipmillError(
            f"{num_changed} rows changed, {num_gone} went, as many came, but {figures}, {counts}"
        )
    return figures


def plan_line(figures: PlanFigures) -> str:
    """The figures in one line."""
    return (
        f"{figures.num_keys:,} keys, {figures.num_due:,} due, {figures.num_dead:,} dead: "
        f"{figures.seconds:.1f} s ({figures.core_seconds:.1f} s of a core), "
        f"{figures.peak_memory_bytes / 2**30:.2f} GiB at most"
    )


def _catalog_config(folder: Path) -> CatalogConfig:
    return CatalogConfig(uri=str(folder / "catalog"), version_column="version")


def _make(folder: Path, *, num_keys: int, num_changed: int, num_gone: int) -> None:
    """Write a catalog, and the store of the day before, which lacks its last `num_gone` keys."""
    (folder / "catalog").mkdir()
    (folder / "store" / "embeddings" / "made").mkdir(parents=True)
    everything = np.random.default_rng(0).permutation(num_keys + num_gone)
    stored_files = []
    for number, part in enumerate(np.array_split(everything, NUM_FILES)):
        stored_files += _store(folder / "store", part[part < num_keys], number=number)
        # The keys that went are the first; those that changed come after them.
        now = _rows(part[part >= num_gone], num_changed=num_gone + num_changed)
        now = now.append_column("text", pa.repeat("a caption", now.num_rows))
        path = folder / "catalog" / f"{number:04d}.parquet"
        pq.write_table(now, path, row_group_size=ROWS_PER_GROUP)
    catalog = open_catalog(_catalog_config(folder))
    snapshot = Snapshot(
        number=1,
        parent=None,
        created_at="2026-01-01T00:00:00+00:00",
        run_id="made",
        engine=EngineRecord(engine_id="made", checkpoint="made", revision=None),
        # No file is the same, so that no row is trusted by its key.
        catalog=replace(catalog_record(catalog, num_keys=num_keys), files={}),
        key_type=str(catalog.key_type),
        embedding_dim=EMBEDDING_DIM,
        embedding_dtype="float32",
        modalities=catalog.modalities,
        files=tuple(stored_files),
    )
    commit(Store(str(folder / "store")), snapshot)


def _store(folder: Path, numbers: NDArray[np.int64], *, number: int) -> list[StoredFile]:
    """Write the embeddings of some keys of one file of the catalog."""
    files = []
    rows_per_file = Resources().rows_per_file
    columns = schema.embeddings_schema(
        key_type=pa.string(), embedding_dim=EMBEDDING_DIM, dtype="float32"
    )
    for first in range(0, len(numbers), rows_per_file):
        before = numbers[first : first + rows_per_file]
        path = f"embeddings/made/text-{number:04d}-{first:09d}.parquet"
        values = pa.array(np.zeros(len(before) * EMBEDDING_DIM, dtype=np.float32))
        table = pa.table(
            {
                schema.KEY: _keys(before),
                schema.MODALITY: pa.repeat("text", len(before)),
                schema.EMBEDDING: pa.FixedSizeListArray.from_arrays(values, EMBEDDING_DIM),
                schema.FINGERPRINT: row_fingerprints(_rows(before, num_changed=0), modality="text"),
                schema.ENGINE_ID: pa.repeat("made", len(before)),
            }
        )
        pq.write_table(table.cast(columns), folder / path)
        files.append(
            StoredFile(
                path=path,
                kind="embeddings",
                modality="text",
                num_rows=len(before),
                num_bytes=(folder / path).stat().st_size,
            )
        )
    return files


def _keys(numbers: NDArray[np.int64]) -> pa.Array:
    digits = pc.utf8_lpad(pa.array(numbers).cast(pa.string()), 12, padding="0")
    return pc.binary_join_element_wise("item", digits, "-")


def _rows(numbers: NDArray[np.int64], *, num_changed: int) -> pa.Table:
    versions = np.where(numbers < num_changed, "2", "1")
    return pa.table({schema.KEY: _keys(numbers), schema.VERSION: pa.array(versions, pa.string())})
