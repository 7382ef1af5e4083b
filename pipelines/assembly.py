"""Assembles the files of the next snapshot: live files as they are, others without dead rows.

Knows nothing of how rows came to be live or dead.
"""

from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import schema
from pipelines.ledger import Ledger
from pipelines.snapshots import StoredFile
from pipelines.store import Store
from pipelines.writing import write_table


def next_files(
    files: Sequence[StoredFile],
    *,
    ledger: Ledger,
    key_type: pa.DataType,
    plan_id: str,
    store: Store,
) -> list[StoredFile]:
    """The files that hold exactly the live rows, and the rejects of whole rows.

    Args:
        files: All files with rows in the ledger, and files of whole-row rejects.
        ledger: Settled.
        key_type: string or int64.
        plan_id: Under which new files are written.
        store: Where they lie.
    """
    write = _Rewriter(ledger=ledger, plan_id=plan_id, store=store)
    rejects = ledger.whole_row_rejects(key_type=key_type)
    return [*write.live(files), *write.whole_row_rejects(rejects, files=files)]


def count_rejects(store: Store, files: Sequence[StoredFile]) -> dict[str, int]:
    """Reason -> rows, most frequent first."""
    counts: dict[str, int] = {}
    for stored in files:
        with store.open(stored.path) as file:
            reasons = pq.read_table(file, columns=[schema.REASON])[schema.REASON]
        for entry in reasons.value_counts().to_pylist():
            counts[entry["values"]] = counts.get(entry["values"], 0) + entry["counts"]
    return dict(sorted(counts.items(), key=lambda entry: -entry[1]))


class _Rewriter:
    def __init__(self, *, ledger: Ledger, plan_id: str, store: Store) -> None:
        self._ledger = ledger
        self._plan_id = plan_id
        self._store = store

    def live(self, files: Sequence[StoredFile]) -> Iterator[StoredFile]:
        num_live = self._ledger.num_live_by_path()
        for stored in files:
            live = num_live.get(stored.path, 0)
            if live == stored.num_rows:
                yield stored
            elif live:
                with self._store.open(stored.path) as file:
                    rows = pq.read_table(file).take(self._ledger.live_positions(stored.path))
                yield write_table(
                    rows,
                    kind=stored.kind,
                    modality=stored.modality,
                    plan_id=self._plan_id,
                    store=self._store,
                )

    def whole_row_rejects(
        self, rejects: pa.Table, *, files: Sequence[StoredFile]
    ) -> Iterator[StoredFile]:
        for stored in files:
            if stored.modality is None:
                with self._store.open(stored.path) as file:
                    if pq.read_table(file).equals(rejects):
                        yield stored
                        return
        if rejects.num_rows:
            yield write_table(
                rejects, kind="rejects", modality=None, plan_id=self._plan_id, store=self._store
            )
