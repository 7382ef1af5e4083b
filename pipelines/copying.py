"""Copies stored embeddings, bit for bit, to due rows that have the same contents under other keys.

Knows nothing of how such rows are found.
"""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from pipelines import schema
from pipelines.arrow_files import read_parquet
from pipelines.bounded_map import bounded_map
from pipelines.ledger import Ledger
from pipelines.snapshots import StoredFile
from pipelines.store import Store
from pipelines.writing import write_table

# Each holds one stored file and one to be written.
COPY_THREADS = 4


def copy_embeddings(
    ledger: Ledger, *, rows_per_file: int, plan_id: str, store: Store
) -> Iterator[StoredFile]:
    """Write the embeddings of moved rows under their new keys; yields the files, each whole.

    Each stored file is read about once; memory is bounded by the size of files, not by rows.

    Args:
        ledger: Settled; not to be asked for anything else meanwhile.
        rows_per_file: Of a written file, at most.
        plan_id: Under which the files are found again.
        store: Where they lie.
    """

    def copy(rows: pa.Table) -> StoredFile:
        return write_table(
            _copied(rows, store=store),
            kind="embeddings",
            modality=rows[schema.MODALITY][0].as_py(),
            plan_id=plan_id,
            store=store,
            origin="stored",
        )

    tables = ledger.copies(max_rows=rows_per_file)
    return bounded_map(copy, tables, num_threads=COPY_THREADS)


def _copied(rows: pa.Table, *, store: Store) -> pa.Table:
    """The rows of stored files at `path` and `position`, ordered by them, with another `key`."""
    paths = rows[schema.PATH].combine_chunks().dictionary_encode()
    positions = rows["position"].to_numpy()
    starts = np.searchsorted(paths.indices.to_numpy(), np.arange(len(paths.dictionary) + 1))
    parts = []
    for path, first, last in zip(
        paths.dictionary.to_pylist(), starts[:-1], starts[1:], strict=True
    ):
        with store.open(path) as file:
            parts.append(read_parquet(file).take(positions[first:last]))
    copied = pa.concat_tables(parts)
    column = copied.column_names.index(schema.KEY)
    field = copied.schema.field(column)
    return copied.set_column(column, field, rows[schema.KEY].cast(field.type))
