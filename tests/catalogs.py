"""Sample catalogs for tests, and what a store holds of them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jobs.demo.catalog import sample_rows
from pipelines.schema import Modality
from pipelines.snapshots import Snapshot, current_snapshot
from pipelines.store import Store


def scene_rows(num_rows: int) -> list[dict[str, Any]]:
    """Rows of `key`, `image` and `text`: distinct drawn scenes and their captions."""
    return [
        {"key": f"k{number:04d}", "image": row.image, "text": row.text}
        for number, row in enumerate(sample_rows(num_rows))
    ]


def write_rows(
    folder: Path,
    rows: Sequence[Mapping[str, Any]],
    *,
    num_files: int = 1,
    schema: pa.Schema | None = None,
) -> Path:
    """Write rows to Parquet files of small row groups; files of an earlier call are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("*.parquet"):
        stale.unlink()
    per_file = -(-len(rows) // num_files)
    for number in range(num_files):
        part = list(rows[number * per_file : (number + 1) * per_file])
        table = pa.Table.from_pylist(part, schema=schema)
        pq.write_table(table, folder / f"part-{number}.parquet", row_group_size=16)
    return folder


def stored_snapshot(store_dir: Path) -> Snapshot:
    """The current snapshot of a store that has one."""
    snapshot = current_snapshot(Store(str(store_dir)))
    assert snapshot is not None
    return snapshot


def stored_rows(store_dir: Path, *, kind: str = "embeddings") -> list[dict[str, Any]]:
    """Every row of the current snapshot, read as anyone would."""
    rows: list[dict[str, Any]] = []
    for file in stored_snapshot(store_dir).files:
        if file.kind == kind:
            rows += pq.read_table(store_dir / file.path).to_pylist()
    return rows


def stored_embeddings(store_dir: Path, *, modality: Modality) -> dict[Any, np.ndarray]:
    """Key -> embedding; fails on a key that is there twice."""
    found: dict[Any, np.ndarray] = {}
    for row in stored_rows(store_dir):
        if row["modality"] == modality:
            assert row["key"] not in found
            found[row["key"]] = np.asarray(row["embedding"])
    return found
