"""Fills a ledger: what the store holds, and what the catalog holds now.

Knows nothing of engines; contents are read only where a key alone cannot tell.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc
import ray

from pipelines import schema
from pipelines.arrow_files import open_parquet
from pipelines.bounded_map import bounded_map
from pipelines.catalog import Catalog
from pipelines.fingerprints import plan_id as fingerprint_plan
from pipelines.fingerprints import row_fingerprints
from pipelines.ledger import Ledger
from pipelines.reading import CatalogDatasource, all_rows, num_blocks
from pipelines.schema import Modality, Reason
from pipelines.snapshots import CatalogRecord, EngineRecord, Kind, Snapshot, StoredFile
from pipelines.store import Store
from pipelines.stored_rows import READ_THREADS, read_stored
from pipelines.writing import staging_dir

# Kind of file -> what a ledger takes of its rows.
_LEDGER_COLUMNS: Mapping[Kind, tuple[str, ...]] = {
    "embeddings": (schema.KEY, schema.FINGERPRINT),
    "rejects": (schema.KEY, schema.FINGERPRINT, schema.REASON),
}


def plan_id_of(catalog: Catalog, *, engine: EngineRecord, settings: Iterable[str]) -> str:
    """The name of the work: the same catalog files, columns, engine and settings give the same.

    What a killed run had written is found again under it.
    """
    columns = [f"{role}={column}" for role, column in catalog_columns(catalog).items()]
    files = [f"{file.path} {file.identity}" for file in catalog.files]
    build = [engine.engine_id, *filter(None, [engine.weights])]
    return fingerprint_plan([*build, *settings, *columns, *files])


def catalog_columns(catalog: Catalog) -> dict[str, str | None]:
    """Role -> column, of all roles."""
    return {
        "key": catalog.config.key_column,
        "image": catalog.image_column,
        "text": catalog.text_column,
        "version": catalog.config.version_column,
        "carry": ", ".join(sorted(catalog.config.carry_columns)) or None,
    }


def catalog_record(catalog: Catalog, *, num_keys: int) -> CatalogRecord:
    """What a snapshot remembers of its catalog."""
    return CatalogRecord(
        uri=catalog.config.uri,
        num_rows=catalog.num_rows,
        num_keys=num_keys,
        columns=catalog_columns(catalog),
        files={file.path: file.identity for file in catalog.files},
    )


def staged_reasons(store: Store, *, plan_id: str) -> dict[str, str]:
    """Of the rejects that lie there for a plan: reason -> what is said of one of them."""
    files = staged_files(store, plan_id=plan_id, committed=(), kinds=("rejects",))
    found: dict[str, str] = {}
    for _, rows in read_stored(store, files, columns=[schema.REASON, schema.DETAIL]):
        for reason in rows[schema.REASON].unique().to_pylist():
            if reason not in found:
                row = pc.index(rows[schema.REASON], reason).as_py()
                found[reason] = rows[schema.DETAIL][row].as_py()
    return dict(sorted(found.items()))


def staged_files(
    store: Store,
    *,
    plan_id: str,
    committed: Iterable[StoredFile],
    kinds: Sequence[Kind] = ("embeddings", "rejects"),
) -> list[StoredFile]:
    """Files that an earlier, unfinished run of the same plan left, but not those committed."""
    known = {file.path for file in committed}
    found = [
        (kind, modality, path)
        for kind in kinds
        for path in store.list(staging_dir(kind, plan_id=plan_id), suffix=".parquet")
        for modality in schema.MODALITIES
        if path.rsplit("/", 1)[-1].startswith(f"{modality}-") and path not in known
    ]

    def described(place: tuple[Kind, Modality, str]) -> StoredFile:
        kind, modality, path = place
        with store.open(path) as file:
            return StoredFile(
                path=path,
                kind=kind,
                modality=modality,
                num_rows=open_parquet(file).metadata.num_rows,
                num_bytes=file.seek(0, 2),
            )

    return list(bounded_map(described, found, num_threads=READ_THREADS))


def modalities_by_content(catalog: Catalog) -> tuple[Modality, ...]:
    """Modalities of which rows with equal fingerprints have equal embeddings, and may share one.

    None with a version column, whose fingerprints are of key and version, and tell nothing of
    contents. None with carried columns either: they belong to each row, not to its content.
    """
    config = catalog.config
    return () if config.version_column or config.carry_columns else catalog.modalities


def fill(
    ledger: Ledger,
    catalog: Catalog,
    *,
    parent: Snapshot | None,
    staged: Iterable[StoredFile],
    store: Store,
    num_cpus: float,
    retried: Collection[str] = (),
) -> None:
    """Read both sides into an empty ledger, and settle it.

    Args:
        ledger: To be filled.
        catalog: What is wanted.
        parent: The snapshot that a run goes on from; None in an empty store.
        staged: Files that an earlier run of this very plan left.
        store: Where all that is stored lies.
        num_cpus: For a task of the cluster that reads contents, where keys cannot tell.
        retried: Reject reasons: rows that were rejected for them are due again, and then all that
            an unfinished run rejected.
    """
    committed = () if parent is None else parent.files
    add_stored(ledger, committed, store=store, staged=False, retried=retried)
    # What is tried again is not to be settled by a reject of an earlier try.
    again = schema.REASONS if retried else ()
    add_stored(ledger, staged, store=store, staged=True, retried=again)
    _add_catalog(ledger, catalog, parent=parent, store=store, num_cpus=num_cpus)
    ledger.settle()


def add_stored(
    ledger: Ledger,
    files: Iterable[StoredFile],
    *,
    store: Store,
    staged: bool,
    retried: Collection[str] = (),
) -> None:
    """Read keys and fingerprints of stored files into the ledger.

    Args:
        ledger: To be filled.
        files: Those with a modality; rejects of whole rows are found anew each time.
        store: Where they lie.
        staged: Whether they are of this very plan.
        retried: Reject reasons: rows that were rejected for them are due again.
    """
    with_modality = [file for file in files if file.modality is not None]
    for kind, columns in _LEDGER_COLUMNS.items():
        of_kind = (file for file in with_modality if file.kind == kind)
        for file, rows in read_stored(store, of_kind, columns=columns):
            due_again = None
            if kind == "rejects" and retried:
                reasons = pa.array(sorted(retried), pa.string())
                due_again = pc.is_in(rows[schema.REASON], reasons).to_numpy()
            ledger.add_stored_rows(rows, file=file, retried=due_again, staged=staged)


def _add_catalog(
    ledger: Ledger, catalog: Catalog, *, parent: Snapshot | None, store: Store, num_cpus: float
) -> None:
    """Read the keys of a catalog into the ledger, with fingerprints where they are needed.

    A file that the parent snapshot was made from, unchanged since, is trusted by key. So is
    everything when there is no parent: nothing is stored that could be out of date.
    """
    known = _known_files(catalog, parent=parent, store=store)
    trusted = [file.path for file in catalog.files if known.get(file.path) == file.identity]
    changed = [file.path for file in catalog.files if known.get(file.path) != file.identity]
    for rows in _read_keys(catalog, paths=trusted):
        ledger.add_catalog_rows(rows, trusted=True)
    hashed = _read_keys if catalog.config.version_column else partial(_hash, num_cpus=num_cpus)
    for rows in hashed(catalog, paths=changed):
        ledger.add_catalog_rows(rows, trusted=False)


def _known_files(catalog: Catalog, *, parent: Snapshot | None, store: Store) -> Mapping[str, str]:
    """Path -> identity of the files whose rows are, key by key, what the store was made from."""
    if parent is None:
        return {file.path: file.identity for file in catalog.files}
    if parent.catalog.columns != catalog_columns(catalog):
        return {}
    # A key that was a duplicate in one file is stored with the content of another, which may be
    # gone by now.
    of_whole_rows = [file for file in parent.files_of("rejects") if file.modality is None]
    shadowed: set[str] = set()
    for _, rows in read_stored(store, of_whole_rows, columns=[schema.REASON, schema.SOURCE_FILE]):
        duplicates = rows.filter(pc.field(schema.REASON) == Reason.DUPLICATE_KEY.value)
        shadowed |= set(duplicates[schema.SOURCE_FILE].unique().to_pylist())
    return {path: of for path, of in parent.catalog.files.items() if path not in shadowed}


def _read_keys(catalog: Catalog, *, paths: Sequence[str]) -> Iterator[pa.Table]:
    """Keys, and versions if there are any: little to read, so the driver's threads do it."""
    source = CatalogDatasource(catalog, pieces=all_rows(catalog, paths=paths), content=())
    reads = source.get_read_tasks(1)
    for tables in bounded_map(lambda read: list(read()), reads, num_threads=READ_THREADS):
        for table in tables:
            yield _with_fingerprints(table, modalities=catalog.modalities)


def _hash(catalog: Catalog, *, paths: Sequence[str], num_cpus: float) -> Iterator[pa.Table]:
    """Fingerprints of contents: all of them are read, so the cluster does it."""
    pieces = list(all_rows(catalog, paths=paths))
    if pieces:
        source = CatalogDatasource(catalog, pieces=pieces, content=catalog.modalities)
        hashed = ray.data.read_datasource(
            source, num_cpus=num_cpus, override_num_blocks=num_blocks(pieces)
        ).map_batches(
            partial(_with_fingerprints, modalities=catalog.modalities),
            batch_format="pyarrow",
            num_cpus=num_cpus,
        )
        yield from hashed.iter_batches(batch_size=None, batch_format="pyarrow")


def _with_fingerprints(table: pa.Table, modalities: Sequence[Modality]) -> pa.Table:
    rows = table.select([schema.SOURCE_FILE, schema.SOURCE_ROW, schema.KEY])
    for modality in modalities:
        is_hashable = schema.VERSION in table.column_names or modality in table.column_names
        fingerprints = (
            row_fingerprints(table, modality=modality)
            if is_hashable
            else pa.nulls(table.num_rows, schema.FINGERPRINT_TYPE)
        )
        rows = rows.append_column(modality, fingerprints)
    return rows
