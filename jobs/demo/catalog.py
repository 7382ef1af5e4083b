"""Writes a sample catalog: Parquet files of drawn scenes with their captions.

Knows nothing of what is done with it.
"""

import io
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.demo.scenes import Scene, scenes

HELDOUT_SEED = 7
NUM_FILES = 4
ROWS_PER_GROUP = 256


def heldout_scenes(num_scenes: int) -> list[Scene]:
    """Scenes whose captions no training scene has, each caption once."""
    return list(islice(scenes(HELDOUT_SEED, split="heldout"), num_scenes))


def write_catalog(folder: Path, *, num_rows: int, num_scenes: int) -> None:
    """Write `key` string, `image` PNG and `text`, in NUM_FILES files.

    Args:
        folder: Where to.
        num_rows: Rows; beyond `num_scenes` the same scenes come again under other keys.
        num_scenes: Distinct scenes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn = heldout_scenes(min(num_scenes, num_rows))
    images = [png(scene) for scene in drawn]
    rows_per_file = -(-num_rows // NUM_FILES)
    for number in range(NUM_FILES):
        rows = range(number * rows_per_file, min((number + 1) * rows_per_file, num_rows))
        table = pa.table(
            {
                "key": [scene_key(row) for row in rows],
                "image": pa.array([images[row % len(images)] for row in rows], pa.binary()),
                "text": [drawn[row % len(drawn)].caption for row in rows],
            }
        )
        pq.write_table(table, folder / f"part-{number}.parquet", row_group_size=ROWS_PER_GROUP)


def scene_key(row: int) -> str:
    """The key of a row of the sample catalog."""
    return f"scene-{row:06d}"


def png(scene: Scene) -> bytes:
    """A scene drawn and encoded."""
    buffer = io.BytesIO()
    scene.draw().save(buffer, "PNG")
    return buffer.getvalue()
