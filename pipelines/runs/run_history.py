"""Reads the records of a store's runs, the newest last, and tells which of them were killed.

Knows nothing of how runs are compared or shown.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime

from pipelines.errors import StoreError
from pipelines.runs.run_ids import RUNS_DIR
from pipelines.runs.run_journal import BEAT_SECONDS
from pipelines.runs.run_records import RunRecord, read_record
from pipelines.store import Store

# A record that was not written for so long is of a run that was killed. Machines' clocks differ.
KILLED_SECONDS = 5 * BEAT_SECONDS
READ_THREADS = 16  # records are small; the wait is the object store's


def run_ids(store: Store) -> list[str]:
    """Names of the runs on record, the newest last; StoreError."""
    return store.names(RUNS_DIR)


def read_history(store: Store, *, num_last: int) -> list[tuple[str, RunRecord | StoreError]]:
    """The last runs by name, the newest last; in the place of a record that is damaged, why.

    A run whose record says that it goes on, but was last written long ago, was killed.

    Raises:
        StoreError: The store cannot be listed.
    """
    names = run_ids(store)[-num_last:]
    with ThreadPoolExecutor(READ_THREADS) as threads:
        found = threads.map(lambda name: _read(store, name), names)
        return [(name, record) for name, record in zip(names, found, strict=True) if record]


def find_run(store: Store, wanted: str | None) -> RunRecord:
    """One run by its name, or by how that begins; None means the last.

    Raises:
        StoreError: There is no such run, or more than one, or its record cannot be read.
    """
    names = run_ids(store)
    if not names:
        raise StoreError(
            f"store {store.uri} has no run on record; `clipmill embed` and `clipmill nightly` make "
            "some"
        )
    matching = names[-1:] if wanted is None else [name for name in names if name == wanted]
    matching = matching or [name for name in names if name.startswith(str(wanted))]
    if len(matching) != 1:
        what = f"{len(matching)} runs begin" if matching else "no run begins"
        raise StoreError(
            f"store {store.uri}: {what} with {wanted!r}; `clipmill runs list` shows their names"
        )
    record = read_record(store, matching[0])
    if record is None:
        raise StoreError(f"store {store.uri}: runs/{matching[0]} holds neither record nor report")
    return _judged(record)


def run_before(store: Store, record: RunRecord) -> RunRecord:
    """The run that began before another; StoreError if there is none, or it cannot be read."""
    earlier = [name for name in run_ids(store) if name < record.run_id]
    if not earlier:
        raise StoreError(
            f"store {store.uri}: no run before {record.run_id} is on record; compare it once there "
            "is another"
        )
    return find_run(store, earlier[-1])


def readable(history: Sequence[tuple[str, RunRecord | StoreError]]) -> list[RunRecord]:
    """Those records that could be read."""
    return [record for _, record in history if isinstance(record, RunRecord)]


def _read(store: Store, name: str) -> RunRecord | StoreError | None:
    try:
        record = read_record(store, name)
        return record and _judged(record)
    except StoreError as error:
        return error


def _judged(record: RunRecord) -> RunRecord:
    try:
        silent = datetime.now(UTC) - datetime.fromisoformat(record.seen_at)
    except (TypeError, ValueError) as error:
        raise StoreError(
            f"record of run {record.run_id} is damaged: seen_at {record.seen_at!r} is no time with "
            f"a zone ({error}); remove {RUNS_DIR}/{record.run_id}"
        ) from error
    if record.status == "running" and silent.total_seconds() > KILLED_SECONDS:
        return replace(record, status="killed")
    return record
