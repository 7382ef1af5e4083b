"""Makes a large catalog of few images: the same ones again and again under other keys.

Knows nothing of what is measured with it.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.benches.catalog_rows import first_rows
from pipelines import schema

MAX_IMAGES = 1_000
ROWS_PER_FILE, ROWS_PER_GROUP = 8_192, 512
_WRITERS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class RepeatedImages:
    """Of which images, and how many of them are spoiled."""

    catalog_uri: str
    """With image bytes; its first 1,000 are taken."""
    damaged_share: float = 0.0
    """Of the rows: each is cut in half, every second of them with an end marker."""

    def __post_init__(self) -> None:
        """Check the bounds."""
        if not 0 <= self.damaged_share <= 0.5:
            raise ValueError(f"damaged_share={self.damaged_share}: expected 0 to 0.5")


def write_images(folder: Path, images: RepeatedImages, *, num_rows: int) -> None:
    """Write `key` string and `image` binary.

    Args:
        folder: To be made.
        images: Which.
        num_rows: Of the catalog.

    Raises:
        CatalogError: There are no such images.
    """
    folder.mkdir(parents=True)
    found = first_rows(images.catalog_uri, modalities=["image"], num_rows=MAX_IMAGES)
    contents: list[bytes] = found[schema.IMAGE].to_pylist()

    def image(row: int) -> bytes:
        content = contents[row % len(contents)]
        before, after = (int(number * images.damaged_share) for number in (row, row + 1))
        if before == after:
            return content
        return content[: len(content) // 2] + (b"\xff\xd9" if after % 2 else b"")

    def write(first: int) -> None:
        rows = range(first, min(first + ROWS_PER_FILE, num_rows))
        table = pa.table(
            {
                "key": pa.array([f"{row:09d}" for row in rows], pa.string()),
                "image": pa.array([image(row) for row in rows], pa.binary()),
            }
        )
        pq.write_table(
            table,
            folder / f"part-{first // ROWS_PER_FILE:05d}.parquet",
            row_group_size=ROWS_PER_GROUP,
            compression="none",  # JPEGs do not shrink
            use_dictionary=False,
        )

    with ThreadPoolExecutor(_WRITERS) as threads:
        list(threads.map(write, range(0, num_rows, ROWS_PER_FILE)))
