"""Which rows of an index another snapshot changes: found by keys and fingerprints alone.

Knows nothing of vectors. Files that both snapshots list are not read.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines import schema
from pipelines.arrow_files import open_parquet, parquet_columns
from pipelines.indexes.bitmaps import ids_in
from pipelines.indexes.rows import RowTable
from pipelines.snapshots import StoredFile
from pipelines.store import Store
from pipelines.stored_rows import read_stored

Ids = NDArray[np.int64]
_OWN_COLUMNS = frozenset({schema.MODALITY, schema.EMBEDDING, schema.FINGERPRINT, schema.ENGINE_ID})


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RowChanges:
    """What sets two snapshots apart."""

    removed_ids: Ids
    """int64 [N]: rows that are gone; not those that come again with another content."""
    coming: tuple[tuple[StoredFile, Ids], ...]
    """Files of the later snapshot, and which of their rows are new or have another content."""
    num_changed: int
    """Of the rows that come: those whose keys were there."""

    @property
    def num_coming(self) -> int:
        """Rows that are new or have another content."""
        return sum(len(rows) for _, rows in self.coming)

    @property
    def num_all(self) -> int:
        """Rows that are not as they were."""
        return len(self.removed_ids) + self.num_coming


def find_row_changes(
    store: Store, rows: RowTable, *, before: Sequence[StoredFile], after: Sequence[StoredFile]
) -> RowChanges:
    """Compare the files of two snapshots' embeddings of one modality, by one engine.

    Args:
        store: Of both.
        rows: Of the index of the earlier.
        before: Files of the earlier.
        after: Of the later.

    Raises:
        StoreError: A file cannot be read.
    """
    shared = {file.path for file in before} & {file.path for file in after}
    old_ids, old_prints = [np.zeros(0, dtype=np.int64)], [np.zeros((0, 2), dtype=np.uint64)]
    for _, table in _read(store, before, shared):
        old_ids.append(rows.ids_of(table[schema.KEY].combine_chunks()))
        old_prints.append(_prints(table))
    ids, prints = np.concatenate(old_ids), np.concatenate(old_prints)
    order = np.argsort(ids)
    ids, prints = ids[order], prints[order]
    stay = np.zeros(len(ids), dtype=np.bool_)
    coming = []
    num_changed = 0
    for file, table in _read(store, after, shared):
        new_ids, new_prints = rows.ids_of(table[schema.KEY].combine_chunks()), _prints(table)
        places = np.minimum(np.searchsorted(ids, new_ids), max(len(ids) - 1, 0))
        was_there = np.zeros(len(new_ids), dtype=np.bool_)
        if len(ids):
            was_there = (new_ids >= 0) & (ids[places] == new_ids)
        same = was_there.copy()
        same[was_there] = (prints[places[was_there]] == new_prints[was_there]).all(axis=1)
        same &= new_prints.any(axis=1)  # without a fingerprint nobody knows
        stay[places[was_there]] = True
        num_changed += int((was_there & ~same).sum())
        if not same.all():
            coming.append((file, np.flatnonzero(~same)))
    return RowChanges(removed_ids=ids[~stay], coming=tuple(coming), num_changed=num_changed)


def all_rows_coming(store: Store, rows: RowTable, *, after: Sequence[StoredFile]) -> RowChanges:
    """The changes by another engine, which makes other vectors of all rows.

    Raises:
        StoreError: A file cannot be read.
    """
    kept = np.zeros(rows.num_ids, dtype=np.bool_)
    for _, table in read_stored(store, after, columns=[schema.KEY]):
        ids = rows.ids_of(table[schema.KEY].combine_chunks())
        kept[ids[ids >= 0]] = True
    was_there = np.zeros(rows.num_ids, dtype=np.bool_)
    was_there[ids_in(rows.alive())[: rows.num_rows]] = True
    return RowChanges(
        removed_ids=np.flatnonzero(was_there & ~kept),
        coming=tuple((file, np.arange(file.num_rows)) for file in after if file.num_rows),
        num_changed=int(kept.sum()),
    )


def read_coming(
    store: Store, changes: RowChanges, *, without: Sequence[str] = ()
) -> pa.Table | None:
    """Keys, embeddings and carried columns of the rows that come; None if there are none.

    Args:
        store: Where they are.
        changes: Which.
        without: Columns that are not read.

    Raises:
        StoreError: A file cannot be read.
    """
    parts = []
    for file, rows in changes.coming:
        with store.open(file.path) as opened:
            parquet = open_parquet(opened)
            names = set(parquet.schema_arrow.names) - _OWN_COLUMNS | {schema.EMBEDDING}
            wanted = [name for name in parquet.schema_arrow.names if name in names - set(without)]
            parts.append(parquet.read(wanted).take(pa.array(rows)))
    return pa.concat_tables(parts) if parts else None


def carried_columns(store: Store, file: StoredFile) -> pa.Schema:
    """The key and the carried columns of a file of embeddings; StoreError if it is damaged."""
    with store.open(file.path) as opened:
        columns = parquet_columns(opened)
    return pa.schema([field for field in columns if field.name not in _OWN_COLUMNS])


def _read(
    store: Store, files: Sequence[StoredFile], shared: set[str]
) -> Iterator[tuple[StoredFile, pa.Table]]:
    own = [file for file in files if file.path not in shared]
    return read_stored(store, own, columns=[schema.KEY, schema.FINGERPRINT])


def _prints(table: pa.Table) -> NDArray[np.uint64]:
    """Fingerprints as uint64 [N, 2]; zeros where there is none."""
    column = table[schema.FINGERPRINT].combine_chunks()
    zeros = pa.scalar(bytes(16), schema.FINGERPRINT_TYPE)
    content = column.fill_null(zeros).buffers()[1]
    prints = np.frombuffer(content, dtype=np.uint64)[2 * column.offset :][: 2 * len(column)]
    return prints.reshape(-1, 2)
