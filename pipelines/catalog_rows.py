"""Finds single rows of a catalog by their keys, and reads their images.

Knows nothing of what the images are shown for.
"""

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from engine.publishing.file_systems import file_system_errors, open_parts
from pipelines import schema
from pipelines.arrow_files import open_parquet
from pipelines.catalog import NO_COLUMN, Catalog, CatalogConfig, open_catalog
from pipelines.errors import CatalogError
from pipelines.fetching.fetch import FetchFailure, fetch_all
from pipelines.fetching.fetch_policy import FetchPolicy
from pipelines.indexes.key_hashes import hash_content, hash_keys, key_content
from pipelines.reading import RowGroupRows, all_rows, read_rows
from pipelines.snapshots import CatalogRecord

MAX_READ_BYTES = 64 * 2**20
"""Of images in a row group up to a row: Parquet has no way to begin in the midst of one."""


class CatalogRows:
    """The rows of a catalog by their keys; 16 bytes of memory for each."""

    def __init__(self, record: CatalogRecord, *, fetch: FetchPolicy | None = None) -> None:
        """Read the keys of all rows, as the catalog is now.

        Args:
            record: Of a snapshot. Rows that came since are found as well, those that went are not.
            fetch: From where images may be fetched; None: as without any option.

        Raises:
            CatalogError: It cannot be read, or its columns are others now.
        """
        self._fetch = (fetch or FetchPolicy()).beside(record.uri)
        columns = record.columns
        config = CatalogConfig(
            uri=record.uri,
            key_column=columns["key"] or "key",
            image_column=columns["image"] or NO_COLUMN,
            text_column=columns["text"] or NO_COLUMN,
        )
        self._catalog = open_catalog(config)
        paths = [file.path for file in self._catalog.files]
        self._pieces = list(all_rows(self._catalog, paths=paths))
        self._sizes = [num_rows for file in self._catalog.files for num_rows in file.row_groups]
        self._starts = np.cumsum([0, *self._sizes[:-1]])
        self._hashes, self._positions = _hashed_keys(self._catalog, self._pieces)
        self._image_bytes: dict[str, list[int]] = {}

    @property
    def has_images(self) -> bool:
        """Whether its rows may have images."""
        return self._catalog.image_column is not None

    def image_of(self, key: str | int, *, max_bytes: int) -> bytes | FetchFailure | None:
        """The encoded image of a row; None if there is no such row, or it has no image.

        Args:
            key: Of the row; of several rows of one key, the first counts.
            max_bytes: Of an image that is fetched, at most one byte more is read.

        Raises:
            CatalogError: Its file cannot be read, or too much of it would have to be.
        """
        content = key_content(key, key_type=self._catalog.key_type)
        if content is None or not self.has_images:
            return None
        hash_ = np.uint64(hash_content(content))
        first = np.searchsorted(self._hashes, hash_, side="left")
        end = np.searchsorted(self._hashes, hash_, side="right")
        for position in self._positions[first:end].tolist():
            row = self._row(position)
            if row is None or row[schema.KEY][0].as_py() != key:
                continue
            encoded: bytes | None = row[schema.IMAGE][0].as_py()
            uri: bytes | None = row[schema.IMAGE_URI][0].as_py()
            # As for embedding: bytes that are there win over a path beside them.
            if encoded is None and uri:
                (fetched,) = fetch_all([uri], max_bytes=max_bytes, policy=self._fetch)
                return fetched
            return encoded
        return None

    def _row(self, position: int) -> pa.Table | None:
        """None if the file is another now, and shorter."""
        number = int(np.searchsorted(self._starts, position, side="right")) - 1
        group = self._pieces[number]
        row_in_group = position - int(self._starts[number])
        self._check_cost(group, row_in_group, num_rows=self._sizes[number])
        row = group.first_row + row_in_group
        piece = RowGroupRows(
            path=group.path,
            row_group=group.row_group,
            first_row=group.first_row,
            rows=np.array([row]),
            wanted={"image": np.ones(1, dtype=np.bool_)},
        )
        return next(read_rows(self._catalog, piece, ("image",)), None)

    def _check_cost(self, group: RowGroupRows, row: int, *, num_rows: int) -> None:
        """CatalogError if the images of a row group up to a row are more than are to be read."""
        if group.path not in self._image_bytes:
            self._image_bytes[group.path] = self._image_sizes(group.path)
        sizes = self._image_bytes[group.path]
        if group.row_group >= len(sizes):
            return  # the file is another now, which reading it says
        # As if all were of one size; the first is always read.
        num_bytes = sizes[group.row_group] * row // num_rows
        if num_bytes > MAX_READ_BYTES:
            raise CatalogError(
                f"{group.path}: {num_bytes:,} bytes of images lie before it in row group "
                f"{group.row_group}, more than {MAX_READ_BYTES:,} that are read for one; write "
                "the catalog with smaller row groups"
            )

    def _image_sizes(self, path: str) -> list[int]:
        """Bytes of the images in each row group of a file."""
        name = self._catalog.image_column
        try:
            with open_parts(self._catalog.fs, path) as file:
                metadata = open_parquet(file).metadata
                groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        except (pa.ArrowException, *file_system_errors()) as error:
            raise CatalogError(
                f"{path} cannot be read ({(str(error).splitlines() or [''])[0]}); put it back"
            ) from error
        return [
            sum(
                max(chunk.total_compressed_size, chunk.total_uncompressed_size)
                for chunk in map(group.column, range(group.num_columns))
                if f"{chunk.path_in_schema}.".startswith(f"{name}.")
            )
            for group in groups
        ]


def _hashed_keys(
    catalog: Catalog, pieces: list[RowGroupRows]
) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Hashes of all keys, ascending, and the numbers of their rows, ascending where they equal."""
    hashes, positions = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
    position = 0
    for piece in pieces:
        for table in read_rows(catalog, piece, ()):
            keys = table[schema.KEY].combine_chunks()
            is_key = keys.is_valid().to_numpy(zero_copy_only=False)
            hashes.append(hash_keys(keys.drop_null()))
            positions.append(position + np.flatnonzero(is_key))
            position += table.num_rows
    hashed, numbers = np.concatenate(hashes), np.concatenate(positions)
    order = np.argsort(hashed, kind="stable")
    return hashed[order], numbers[order]
