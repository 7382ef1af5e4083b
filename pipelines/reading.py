"""Reads chosen rows of a catalog as a Ray Data source, in one form whatever their layout.

Knows nothing of why the rows were chosen or what becomes of them.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from engine.publishing.file_systems import file_system_errors, open_parts
from pipelines import schema
from pipelines.arrow_files import open_parquet
from pipelines.catalog import Catalog
from pipelines.catalog_columns import ImageLayout, text_type
from pipelines.cluster.worker_logs import redact_worker
from pipelines.errors import CatalogError
from pipelines.progress import StageMeter, metered
from pipelines.resilience.attempts import attempted
from pipelines.schema import MODALITIES, Modality
from pipelines.versions import version_texts

ROWS_PER_READ = 256
# Of a column of a row group at once; without a bound all of it, hundreds of megabytes of images.
BYTES_PER_READ = 4 * 2**20
# Of keys and versions alone, which are short.
KEYS_PER_READ = 65_536
# Ray's own bound, from which on it thinks that a number of blocks was chosen by mistake.
MANY_READ_TASKS = 5_000


@dataclass(frozen=True, kw_only=True, slots=True)
class RowGroupRows:
    """Some rows of one row group."""

    path: str
    """The file, as the catalog's file system knows it."""
    row_group: int
    """Number of the row group."""
    first_row: int
    """Number of the row group's first row within the file."""
    rows: NDArray[np.int64] | None
    """Ascending row numbers within the file; None for all."""
    wanted: dict[Modality, NDArray[np.bool_]] | None
    """For each of `rows`, whether that modality is to be embedded; None for all."""


def all_rows(catalog: Catalog, *, paths: Sequence[str]) -> Iterator[RowGroupRows]:
    """Every row of the named files."""
    chosen = set(paths)
    for file in catalog.files:
        if file.path in chosen:
            first_row = 0
            for row_group, num_rows in enumerate(file.row_groups):
                yield RowGroupRows(
                    path=file.path, row_group=row_group, first_row=first_row, rows=None, wanted=None
                )
                first_row += num_rows


def num_blocks(pieces: Sequence[RowGroupRows]) -> int | None:
    """One for each piece, or None, as Ray likes; it would cut a small catalog into 200 of them."""
    return len(pieces) if len(pieces) < MANY_READ_TASKS else None


class CatalogDatasource(Datasource):
    """Rows of a catalog as blocks of canonical columns, with their file and row number.

    `key` string or int64; `image` large_binary and `image_uri` binary (either may be null; the URI
    is UTF-8, unchecked); `text` binary (the same); `version` string; carried columns;
    `source_file`, `source_row`; `image_wanted` and `text_wanted` bool. Only the columns asked for
    are read.
    """

    def __init__(
        self,
        catalog: Catalog,
        *,
        pieces: Iterable[RowGroupRows],
        content: Sequence[Modality],
        meter: StageMeter | None = None,
    ) -> None:
        """Choose rows and which contents to read with their keys.

        Args:
            catalog: Opened and checked.
            pieces: The rows to read.
            content: Modalities whose images or texts are read; with none, keys and versions.
            meter: Times the reading, if it is a stage of a run.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        # The list of files can be long, and every read task carries a copy.
        self._catalog = replace(catalog, files=())
        self._meter = meter
        self._pieces = list(pieces)
        self._content = tuple(content)

    def estimate_inmemory_data_size(self) -> int | None:
        """Unknown before it is read."""
        return None

    def get_read_tasks(
        self,
        parallelism: int,
        per_task_row_limit: int | None = None,
        data_context: Any = None,
    ) -> list[ReadTask]:
        """One task for each row group."""
        return [
            ReadTask(
                partial(_read, self._catalog, piece, self._content, self._meter),
                BlockMetadata(
                    num_rows=None if piece.rows is None else len(piece.rows),
                    size_bytes=None,
                    input_files=(piece.path,),
                    exec_stats=None,
                ),
                per_task_row_limit=per_task_row_limit,
            )
            for piece in self._pieces
        ]


def _read(
    catalog: Catalog, piece: RowGroupRows, content: Sequence[Modality], meter: StageMeter | None
) -> Iterator[pa.Table]:
    redact_worker()
    tables = read_rows(catalog, piece, content)
    for number in itertools.count():
        work = f"reading {piece.path}, row group {piece.row_group}, part {number}"
        with attempted(work, meter=meter), metered(meter) as size:
            table = next(tables, None)
            if table is None:
                return
            size(table.num_rows, table.nbytes)
        yield table


def read_rows(
    catalog: Catalog, piece: RowGroupRows, content: Sequence[Modality]
) -> Iterator[pa.Table]:
    """The chosen rows, in the form and the order that `CatalogDatasource` gives.

    Raises:
        CatalogError: The file cannot be read, or is another now.
    """
    config = catalog.config
    columns = [config.key_column]
    columns += [config.version_column] if config.version_column else []
    columns += [catalog.image_column] if "image" in content and catalog.image_column else []
    columns += [catalog.text_column] if "text" in content and catalog.text_column else []
    columns += config.carry_columns if content else ()
    try:
        with open_parts(catalog.fs, piece.path) as file:
            row = piece.first_row
            parquet = open_parquet(file, buffer_size=BYTES_PER_READ, pre_buffer=False)
            for batch in parquet.iter_batches(
                ROWS_PER_READ if content else KEYS_PER_READ,
                row_groups=[piece.row_group],
                columns=list(dict.fromkeys(columns)),
            ):
                first, row = row, row + batch.num_rows
                table = pa.Table.from_batches([batch])
                rows, wanted = _chosen(piece, first=first, num_rows=table.num_rows)
                if len(rows) == 0:
                    continue
                if len(rows) < table.num_rows:
                    table = table.take(rows - first)
                canonical = _canonical(catalog, table, content)
                canonical[schema.SOURCE_FILE] = pa.repeat(piece.path, len(rows))
                canonical[schema.SOURCE_ROW] = rows
                for modality in content:
                    canonical[schema.WANTED[modality]] = wanted[modality]
                yield pa.table(canonical)
    # KeyError: the file was replaced by one without a column that it had when it was opened.
    except (KeyError, pa.ArrowException, *file_system_errors()) as error:
        raise CatalogError(
            f"{piece.path}: row group {piece.row_group} cannot be read "
            f"({str(error).splitlines()[0]}). If the file is gone, put it back; then run the same "
            "command again: if it is the very file, with its time, what was embedded is kept; if "
            "it is another, all that the last snapshot lacks is embedded"
        ) from error


def _chosen(
    piece: RowGroupRows, *, first: int, num_rows: int
) -> tuple[NDArray[np.int64], dict[Modality, NDArray[np.bool_]]]:
    """Of the `num_rows` rows from `first` on: the chosen rows' numbers, and what is wanted."""
    if piece.rows is None or piece.wanted is None:
        flags = np.ones(num_rows, dtype=np.bool_)
        return np.arange(first, first + num_rows), dict.fromkeys(MODALITIES, flags)
    low, high = np.searchsorted(piece.rows, [first, first + num_rows])
    return piece.rows[low:high], {name: all_[low:high] for name, all_ in piece.wanted.items()}


def _canonical(catalog: Catalog, table: pa.Table, content: Sequence[Modality]) -> dict[str, Any]:
    config = catalog.config
    columns: dict[str, Any] = {
        schema.KEY: _cast(table[config.key_column], catalog.key_type),
    }
    if config.version_column:
        columns[schema.VERSION] = _cast(version_texts(table[config.version_column]), pa.string())
    # URIs and texts as bytes: one that is not UTF-8 is a reject, not the end of the run.
    if "image" in content and catalog.image_column:
        images = table[catalog.image_column].combine_chunks()
        encoded, uris = _image_parts(images, layout=catalog.image_layout)
        columns[schema.IMAGE] = _cast(encoded, pa.large_binary())
        columns[schema.IMAGE_URI] = _cast(uris, pa.binary())
    if "text" in content and catalog.text_column:
        columns[schema.TEXT] = _cast(table[catalog.text_column], pa.binary())
    if content:
        columns.update({name: table[name] for name in config.carry_columns})
    return columns


def _image_parts(images: Any, *, layout: ImageLayout | None) -> tuple[Any, Any]:
    nulls = pa.nulls(len(images), pa.string())
    if layout is ImageLayout.STRUCT:
        # struct_field gives null for a null struct, unlike `.field`.
        fields = {field.name: field.type for field in images.type}
        has_path = "path" in fields and text_type(fields["path"]) is not None
        uris = pc.struct_field(images, "path") if has_path else nulls
        return pc.struct_field(images, "bytes"), uris
    return (nulls, images) if layout is ImageLayout.URI else (images, nulls)


def _cast(column: Any, type_: pa.DataType) -> Any:
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    column = column.cast(type_)
    column.validate(full=True)  # Parquet does not keep a writer from strings that are not UTF-8
    return column
