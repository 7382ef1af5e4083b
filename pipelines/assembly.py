"""Assembles the files of the next snapshot: live files as they are, others without dead rows.

Knows nothing of how rows came to be live or dead. What is written lies beside what it was made
from: readers of earlier snapshots, and a run that is killed meanwhile, lose nothing.
"""

from collections.abc import Collection, Iterator, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines import schema
from pipelines.arrow_files import read_parquet
from pipelines.bounded_map import bounded_map
from pipelines.compaction import files_to_write
from pipelines.ledger import Ledger
from pipelines.snapshots import StoredFile
from pipelines.store import Store
from pipelines.stored_rows import read_stored
from pipelines.writing import write_table

# Each holds the rows of one file to be written.
WRITE_THREADS = 4


def next_files(
    files: Sequence[StoredFile],
    *,
    committed: Collection[StoredFile],
    ledger: Ledger,
    key_type: pa.DataType,
    rows_per_file: int,
    plan_id: str,
    store: Store,
) -> list[StoredFile]:
    """The files that hold exactly the live rows, and the rejects of whole rows.

    Files without dead rows are taken as they are, but for small ones: see `pipelines.compaction`.
    If no embedding and no reject came or went, no file is written.

    Args:
        files: All files with rows in the ledger, and files of whole-row rejects.
        committed: Of them, those of the snapshot before.
        ledger: Settled.
        key_type: string or int64.
        rows_per_file: Below half of it a file is small.
        plan_id: Under which new files are written.
        store: Where they lie.
    """
    write = _Rewriter(ledger=ledger, rows_per_file=rows_per_file, plan_id=plan_id, store=store)
    rejects = ledger.whole_row_rejects(key_type=key_type)
    return [
        *write.live(files, committed=frozenset(committed)),
        *write.whole_row_rejects(rejects, files=files),
    ]


def count_rejects(store: Store, files: Sequence[StoredFile]) -> dict[str, int]:
    """Reason -> rows, most frequent first."""
    counts: dict[str, int] = {}
    for _, rows in read_stored(store, files, columns=[schema.REASON]):
        for entry in rows[schema.REASON].value_counts().to_pylist():
            counts[entry["values"]] = counts.get(entry["values"], 0) + entry["counts"]
    return dict(sorted(counts.items(), key=lambda entry: -entry[1]))


class _Rewriter:
    def __init__(self, *, ledger: Ledger, rows_per_file: int, plan_id: str, store: Store) -> None:
        self._ledger = ledger
        self._rows_per_file = rows_per_file
        self._plan_id = plan_id
        self._store = store

    def live(
        self, files: Sequence[StoredFile], *, committed: Collection[StoredFile]
    ) -> Iterator[StoredFile]:
        num_live = self._ledger.num_live_by_path()
        living = [file for file in files if file.path in num_live]
        if all(num_live[file.path] == file.num_rows and file in committed for file in living):
            yield from living
            return
        lists = files_to_write(living, num_live=num_live, rows_per_file=self._rows_per_file)
        rewritten = {file for of_one in lists for file in of_one}
        yield from (file for file in living if file not in rewritten)
        paths = [file.path for of_one in lists for file in of_one]
        positions = self._ledger.live_positions(paths)
        rows = ([(file, next(positions)) for file in of_one] for of_one in lists)
        for written in bounded_map(self._written, rows, num_threads=WRITE_THREADS):
            yield from written

    def _written(self, rows: Sequence[tuple[StoredFile, NDArray[np.int64]]]) -> list[StoredFile]:
        """Write the rows at some positions of some files as one."""
        parts: dict[pa.Schema, list[pa.Table]] = {}
        for stored, positions in rows:
            with self._store.open(stored.path) as file:
                table = read_parquet(file)
                table = table if len(positions) == table.num_rows else table.take(positions)
            parts.setdefault(table.schema, []).append(table)
        first, _ = rows[0]
        # More than one in stores of a Clipmill that let carried columns change their types.
        return [
            write_table(
                pa.concat_tables(tables),
                kind=first.kind,
                modality=first.modality,
                plan_id=self._plan_id,
                store=self._store,
                origin="stored",
            )
            for tables in parts.values()
        ]

    def whole_row_rejects(
        self, rejects: pa.Table, *, files: Sequence[StoredFile]
    ) -> Iterator[StoredFile]:
        for stored in files:
            if stored.modality is None:
                with self._store.open(stored.path) as file:
                    if read_parquet(file).equals(rejects):
                        yield stored
                        return
        if rejects.num_rows:
            yield write_table(
                rejects, kind="rejects", modality=None, plan_id=self._plan_id, store=self._store
            )
