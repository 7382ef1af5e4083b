"""Sample catalogs: drawn scenes with their captions, as Parquet files.

Knows nothing of what is done with them.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.demo.scenes import scenes

HELDOUT_SEED = 7
NUM_FILES = 4
ROWS_PER_GROUP = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleRow:
    """One row of a sample catalog."""

    key: str
    """Its number."""
    image: bytes
    """PNG."""
    text: str
    """The caption."""


def sample_rows(num_rows: int) -> list[SampleRow]:
    """Draw scenes whose captions no training scene has, each caption once."""
    rows = []
    for number, scene in enumerate(islice(scenes(HELDOUT_SEED, split="heldout"), num_rows)):
        buffer = io.BytesIO()
        scene.draw().save(buffer, "PNG")
        row = SampleRow(key=f"scene-{number:05d}", image=buffer.getvalue(), text=scene.caption)
        rows.append(row)
    return rows


def write_catalog(folder: Path, rows: Sequence[SampleRow]) -> None:
    """Write rows as `key` string, `image` binary and `text` string, in NUM_FILES files."""
    folder.mkdir(parents=True, exist_ok=True)
    per_file = -(-len(rows) // NUM_FILES)
    for number in range(NUM_FILES):
        part = rows[number * per_file : (number + 1) * per_file]
        table = pa.table(
            {
                "key": pa.array([row.key for row in part], pa.string()),
                "image": pa.array([row.image for row in part], pa.binary()),
                "text": pa.array([row.text for row in part], pa.string()),
            }
        )
        pq.write_table(table, folder / f"part-{number}.parquet", row_group_size=ROWS_PER_GROUP)
