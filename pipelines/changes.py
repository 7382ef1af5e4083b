"""What changed from one snapshot to another: keys that came, went or have other content.

Knows nothing of embeddings. Files that both snapshots list are not read.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipelines.database import scratch_database, sql_type
from pipelines.errors import StoreError
from pipelines.schema import FINGERPRINT, KEY, Modality
from pipelines.snapshots import Snapshot, StoredFile
from pipelines.store import Store
from pipelines.stored_rows import read_stored


@dataclass(frozen=True, kw_only=True, slots=True)
class Changes:
    """Of one modality, in keys. Each key is in one of these at most."""

    added: int
    """Only in the later snapshot."""
    removed: int
    """Only in the earlier one."""
    changed: int
    """With another fingerprint, as an embedding or as a reject in both."""
    rejected: int
    """Embedded in the earlier snapshot, rejected in the later."""
    healed: int
    """Rejected in the earlier snapshot, embedded in the later."""


def find_changes(store: Store, before: Snapshot, after: Snapshot) -> dict[Modality, Changes]:
    """Compare two snapshots of one store.

    Args:
        store: Of both.
        before: One.
        after: The other; which is the older does not matter.

    Raises:
        StoreError: Their keys are of different types, or a file cannot be read.
    """
    if before.key_type != after.key_type:
        raise StoreError(
            f"store {store.uri}: keys are of type {before.key_type} in snapshot {before.number}, "
            f"{after.key_type} in {after.number}: they cannot be compared"
        )
    shared = set(before.files) & set(after.files)
    modalities = dict.fromkeys((*before.modalities, *after.modalities))
    return {
        modality: _compared(
            store,
            [file for file in before.files if file not in shared and file.modality == modality],
            [file for file in after.files if file not in shared and file.modality == modality],
            key_type=before.key_type,
        )
        for modality in modalities
    }


def _compared(
    store: Store, before: Iterable[StoredFile], after: Iterable[StoredFile], *, key_type: str
) -> Changes:
    key = sql_type(key_type)
    with scratch_database() as db:
        for name, files in (("before", before), ("after", after)):
            db.execute(f"CREATE TABLE {name} ({KEY} {key}, {FINGERPRINT} BLOB, is_reject BOOLEAN)")
            for file, rows in read_stored(store, files, columns=[KEY, FINGERPRINT]):
                is_reject = pa.array(np.full(rows.num_rows, file.kind == "rejects"))
                db.register("incoming", rows.append_column("is_reject", is_reject))
                db.execute(f"INSERT INTO {name} SELECT * FROM incoming")
                db.unregister("incoming")
        in_both = f"b.{KEY} IS NOT NULL AND a.{KEY} IS NOT NULL"
        counts = db.sql(
            f"""SELECT
              count(*) FILTER (b.{KEY} IS NULL) AS added,
              count(*) FILTER (a.{KEY} IS NULL) AS removed,
              count(*) FILTER ({in_both} AND a.is_reject = b.is_reject
                AND a.{FINGERPRINT} IS DISTINCT FROM b.{FINGERPRINT}) AS changed,
              count(*) FILTER ({in_both} AND a.is_reject AND NOT b.is_reject) AS rejected,
              count(*) FILTER ({in_both} AND b.is_reject AND NOT a.is_reject) AS healed
            FROM before b FULL OUTER JOIN after a ON a.{KEY} = b.{KEY}"""
        )
        names = counts.columns
        (values,) = counts.fetchall()
    return Changes(**dict(zip(names, values, strict=True)))
