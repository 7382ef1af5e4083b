"""Writes the rows of an index: a first table, or one that is another with some rows changed.

Knows nothing of how rows are found. Of rows, a batch is in memory at once; of all keys, the hashes.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines import schema
from pipelines.errors import StoreError
from pipelines.indexes.key_hashes import (
    HASHES_FILE,
    Ids,
    hash_keys,
    whole_file,
    write_hashes,
)
from pipelines.indexes.rows import BATCH_ROWS, KEY_TYPES, ROWS_FILE, RowTable


def rows_schema(columns: pa.Schema) -> pa.Schema:
    """How rows with these columns are stored: the key first, dictionaries decoded, all nullable."""
    carried = [field for field in columns if field.name != schema.KEY]
    fields = [columns.field(schema.KEY), *carried]
    return pa.schema([pa.field(field.name, _decoded(field.type)) for field in fields])


def write_rows(
    folder: Path, tables: Iterable[pa.Table], *, columns: pa.Schema | None = None
) -> None:
    """Write a first table: ids are the positions of its rows.

    Args:
        folder: Of the index; files of the same names are replaced.
        tables: Keys, string or int64, and carried columns.
        columns: The columns of all rows, null where a table lacks one; None: of the first table.

    Raises:
        StoreError: A file cannot be written.
    """
    tables = iter(tables)
    if columns is None:
        first = next(tables, pa.table({schema.KEY: pa.array([], pa.string())}))
        tables, columns = _chained(first, tables), first.schema
    wanted = rows_schema(columns)
    hashes: list[NDArray[np.uint64]] = [np.zeros(0, dtype=np.uint64)]

    def hashed(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            assert batch.column(0).null_count == 0
            hashes.append(hash_keys(batch.column(0)))
            yield batch

    _write(folder, hashed(_batches(tables, wanted)), wanted=wanted)
    all_hashes = np.concatenate(hashes)
    hashes.clear()
    ids = np.argsort(all_hashes, kind="stable")
    write_hashes(folder / HASHES_FILE, hashes=all_hashes[ids], ids=ids)


def update_rows(folder: Path, *, parent: RowTable, removed_ids: Ids, added: pa.Table) -> Ids:
    """Write another table: rows go, others come or are replaced, the rest keeps its ids.

    A key of `added` that the parent has keeps its id, even if that is to be removed. The others
    take free ids, lowest first, those removed here included, and then new ones at the end.

    Args:
        folder: Of the new index, not the parent's.
        parent: What it is made from.
        removed_ids: int64 [N].
        added: Distinct keys of the parent's type, and the columns that all rows shall have: one
            that the parent lacks is null in rows that stay, one that this lacks goes.

    Returns:
        The ids int64 [added.num_rows] of the added rows.

    Raises:
        StoreError: The parent is damaged, a column changed its type, or a file cannot be written.
    """
    wanted = rows_schema(added.schema)
    added = _aligned(added, wanted).combine_chunks()
    keys = added[schema.KEY].combine_chunks()
    assert keys.type == parent.key_type
    assert keys.null_count == 0
    assert pc.count_distinct(keys).as_py() == len(keys)
    ids = parent.ids_of(keys)
    is_new = ids < 0
    removed = np.setdiff1d(np.asarray(removed_ids, dtype=np.int64), ids[~is_new])
    num_new = int(is_new.sum())
    free = np.union1d(_free_ids(parent, num_wanted=num_new), removed)[:num_new]
    num_more = num_new - len(free)
    ids[is_new] = np.concatenate([free, parent.num_ids + np.arange(num_more)])
    batches = _changed_batches(parent, removed=removed, added=added, ids=ids, wanted=wanted)
    _write(folder, batches, wanted=wanted)
    hashes, hashed_ids = parent.hashes().changed(
        removed=removed, hashes=hash_keys(keys.filter(pa.array(is_new))), ids=ids[is_new]
    )
    write_hashes(folder / HASHES_FILE, hashes=hashes, ids=hashed_ids)
    return ids


def _free_ids(parent: RowTable, *, num_wanted: int) -> Ids:
    """The lowest free ids of a table, at most so many."""
    num_left = min(num_wanted, parent.num_ids - parent.num_rows)
    found = [np.zeros(0, dtype=np.int64)]
    for number in range(parent.num_batches):
        if num_left <= 0:
            break
        is_free = parent.column(schema.KEY, number).is_null().to_numpy(zero_copy_only=False)
        found.append(np.flatnonzero(is_free)[:num_left] + number * BATCH_ROWS)
        num_left -= len(found[-1])
    return np.concatenate(found)


def _changed_batches(
    parent: RowTable, *, removed: Ids, added: pa.Table, ids: Ids, wanted: pa.Schema
) -> Iterator[pa.RecordBatch]:
    """The batches of a table with some ids free and others with a row of `added`."""
    order = np.argsort(ids)
    sorted_ids, removed = ids[order], np.sort(removed)
    num_ids = max(parent.num_ids, int(ids.max(initial=-1)) + 1)
    for first in range(0, num_ids, BATCH_ROWS):
        end = min(first + BATCH_ROWS, num_ids)
        low, high = np.searchsorted(sorted_ids, [first, end])
        gone = removed[slice(*np.searchsorted(removed, [first, end]))]
        batch = _kept(parent, first // BATCH_ROWS, wanted)
        if low == high and not len(gone):
            yield batch
            continue
        # Row numbers in the batch as it was, then in what is added to it; negative: free.
        rows = np.full(end - first, -1, dtype=np.int64)
        rows[: batch.num_rows] = np.arange(batch.num_rows)
        rows[gone - first] = -1
        rows[sorted_ids[low:high] - first] = batch.num_rows + np.arange(high - low)
        coming = added.take(pa.array(order[low:high]))
        table = pa.concat_tables([pa.Table.from_batches([batch]), coming])
        yield _one_batch(table.take(pa.array(rows, mask=rows < 0)))


def _kept(parent: RowTable, number: int, wanted: pa.Schema) -> pa.RecordBatch:
    """A batch of the parent with the columns wanted; none of its rows if it has no such batch."""
    if number >= parent.num_batches:
        return pa.RecordBatch.from_pylist([], schema=wanted)
    batch = parent.batch(number)
    try:
        batch.validate(full=True)
        if batch.schema.equals(wanted):
            return batch
        return _one_batch(_aligned(pa.Table.from_batches([batch]), wanted))
    except pa.ArrowException as error:
        raise StoreError(
            f"{parent.path} is damaged, or its columns ({_types(batch.schema)}) are not those of "
            f"new rows ({_types(wanted)}): {str(error).splitlines()[0]}. Remove the index it "
            "belongs to and run `clipmill index` again"
        ) from error


def _batches(tables: Iterable[pa.Table], wanted: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Rows of all tables in batches of BATCH_ROWS; the last may have fewer."""
    pending = wanted.empty_table()
    for table in tables:
        pending = pa.concat_tables([pending, _aligned(table, wanted)])
        num_whole = pending.num_rows // BATCH_ROWS
        for number in range(num_whole):
            yield _one_batch(pending.slice(number * BATCH_ROWS, BATCH_ROWS))
        pending = pending.slice(num_whole * BATCH_ROWS)
    if pending.num_rows:
        yield _one_batch(pending)


def _one_batch(table: pa.Table) -> pa.RecordBatch:
    batches = table.combine_chunks().to_batches()
    if len(batches) != 1:
        wide = [name for name in table.column_names if table[name].nbytes >= 2**31]
        raise StoreError(
            f"carried columns {wide} hold more than 2 GB in {table.num_rows} rows, more than an "
            "index keeps; carry what is shorter"
        )
    return batches[0]


def _aligned(table: pa.Table, wanted: pa.Schema) -> pa.Table:
    """The columns wanted, of their types; null where there is none."""
    columns = [
        table[field.name].cast(field.type)
        if field.name in table.column_names
        else pa.nulls(table.num_rows, field.type)
        for field in wanted
    ]
    return pa.table(columns, schema=wanted)


def _decoded(type_: pa.DataType) -> pa.DataType:
    """A type without dictionaries: an IPC file has one for all batches."""
    if pa.types.is_dictionary(type_):
        return _decoded(type_.value_type)
    if pa.types.is_list(type_) or pa.types.is_large_list(type_):
        make = pa.list_ if pa.types.is_list(type_) else pa.large_list
        return make(pa.field(type_.value_field.name, _decoded(type_.value_type)))
    if pa.types.is_struct(type_):
        return pa.struct([pa.field(field.name, _decoded(field.type)) for field in type_])
    return type_


def _write(folder: Path, batches: Iterable[pa.RecordBatch], *, wanted: pa.Schema) -> None:
    assert wanted.field(0).type in KEY_TYPES
    with (
        whole_file(folder / ROWS_FILE) as aside,
        pa.OSFile(str(aside), "wb") as sink,
        pa.ipc.new_file(sink, wanted) as writer,
    ):
        for batch in batches:
            writer.write_batch(batch)


def _chained(first: pa.Table, rest: Iterable[pa.Table]) -> Iterator[pa.Table]:
    yield first
    yield from rest


def _types(columns: pa.Schema) -> str:
    return ", ".join(f"{field.name} {field.type}" for field in columns)
