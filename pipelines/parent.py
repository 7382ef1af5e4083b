"""What a run goes on from: does what it would embed fit beside the snapshot before it?

Knows nothing of how rows are embedded.
"""

import io
from collections.abc import Iterator
from typing import Literal, get_args

import pyarrow as pa
import pyarrow.parquet as pq

from engine.backends.choice import Wanted
from pipelines.arrow_files import parquet_columns
from pipelines.catalog import Catalog
from pipelines.engines import Execution
from pipelines.errors import StoreError
from pipelines.planning import catalog_columns
from pipelines.schema import EmbeddingDtype, WantedDecoder
from pipelines.snapshots import EngineRecord, Snapshot, is_other_engine
from pipelines.store import Store

# What becomes of a store whose rows are of another engine.
EngineChange = Literal["refuse", "re-embed"]
ENGINE_CHANGES: tuple[EngineChange, ...] = get_args(EngineChange)


def check_parent(
    parent: Snapshot | None,
    *,
    catalog: Catalog,
    engine: EngineRecord,
    execution: Execution,
    wanted_backend: Wanted,
    wanted_decoder: WantedDecoder,
    dtype: EmbeddingDtype,
    store: Store,
    engine_change: EngineChange = "refuse",
) -> None:
    """Raise StoreError if embeddings of a run would not fit beside those of the snapshot before.

    Args:
        parent: That snapshot; None in an empty store, which takes all.
        catalog: What is to be embedded.
        engine: With what.
        execution: What executes it, and where images are decoded.
        wanted_backend: What was asked for: who asks by name may ask for another than before.
        wanted_decoder: The same of the decoder.
        dtype: Of stored embeddings.
        store: Whose snapshot it is.
        engine_change: Whether another engine's rows may take the place of all that are there.
    """
    if parent is None:
        return
    is_renewed = engine_change == "re-embed" and is_other_engine(engine, parent)
    faults = []
    if not is_renewed:
        faults += _mixing_faults(
            parent,
            engine=engine,
            execution=execution,
            wanted_backend=wanted_backend,
            wanted_decoder=wanted_decoder,
        )
    of_model = len(faults)
    faults += _catalog_faults(parent, catalog=catalog)
    if not is_renewed:
        faults += _carried_faults(parent, catalog=catalog, store=store)
    of_catalog = len(faults) - of_model
    if parent.embedding_dtype != dtype:
        faults.append(
            f"{parent.embedding_dtype} embeddings, {dtype} was asked for "
            f"(--dtype {parent.embedding_dtype})"
        )
    if faults:
        ways = ["name another --store"]
        ways += ["mend the catalog"] if of_catalog else []
        ways += ["embed with what this one was made with (--engine ID)"] if of_model else []
        if engine_change == "refuse" and is_other_engine(engine, parent):
            ways.append("run `clipmill nightly`, which embeds all rows anew")
        raise StoreError(
            f"store {store.uri} holds {'; '.join(faults)}. They never mix: {', or '.join(ways)}"
        )


def _mixing_faults(
    parent: Snapshot,
    *,
    engine: EngineRecord,
    execution: Execution,
    wanted_backend: Wanted,
    wanted_decoder: WantedDecoder,
) -> list[str]:
    """Why rows of a run may not stand beside those of the snapshot before."""
    faults = []
    for what, option, before, now, asked in (
        ("embeddings by", "--backend", parent.backend, execution.backend, wanted_backend),
        ("images decoded by", "--decode", parent.decoder, execution.decoder, wanted_decoder),
    ):
        if before != now and asked == "auto":
            faults.append(
                f"{what} {before}, here it would be {now}, whose last digits differ "
                f"({option} {before} is the same, {option} {now} mixes them)"
            )
    if parent.engine.engine_id != engine.engine_id:
        faults.append(
            f"embeddings of engine {parent.engine.engine_id} ({parent.engine.checkpoint}), "
            f"{engine.checkpoint} gives {engine.engine_id}"
        )
    elif parent.engine.weights != engine.weights:
        faults.append(
            f"embeddings of another build of engine {engine.engine_id}, with other weights (bring "
            "that one back under --engines)"
        )
    return faults


def _catalog_faults(parent: Snapshot, *, catalog: Catalog) -> Iterator[str]:
    """Why rows of a catalog may not stand beside those of the snapshot before."""
    if parent.key_type != str(catalog.key_type):
        yield f"keys of type {parent.key_type}, the catalog's are {catalog.key_type}"
    carried = catalog_columns(catalog)["carry"]
    if parent.catalog.columns["carry"] != carried:
        yield f"carried columns {parent.catalog.columns['carry']}, {carried} were asked for"
    if parent.modalities != catalog.modalities:
        come = [name for name in catalog.modalities if name not in parent.modalities]
        gone = [name for name in parent.modalities if name not in catalog.modalities]
        ways = [f"--{name}-column none leaves the {name} out" for name in come]
        ways += [f"its {name} column is gone, or --{name}-column names another" for name in gone]
        yield (
            f"{' and '.join(parent.modalities)} of each key, the catalog has "
            f"{' and '.join(catalog.modalities)} ({', '.join(ways)})"
        )


def _carried_faults(parent: Snapshot, *, catalog: Catalog, store: Store) -> Iterator[str]:
    """Carried columns that have another type than in the store: readers take one of all files."""
    stored = parent.files_of("embeddings")
    if not catalog.carried or not stored:
        return
    with store.open(stored[0].path) as file:
        before = parquet_columns(file)
    # As they would be read again: Parquet does not have all types of Arrow.
    written = io.BytesIO()
    pq.write_table(pa.schema(catalog.carried).empty_table(), written)
    for field in parquet_columns(written):
        if field.name in before.names and before.field(field.name).type != field.type:
            yield (
                f"carried column {field.name!r} of type {before.field(field.name).type}, in the "
                f"catalog it is {field.type}"
            )


def same_state(snapshot: Snapshot, parent: Snapshot) -> bool:
    """Whether a snapshot would say nothing that the one before does not."""
    return (
        set(snapshot.files) == set(parent.files)
        and snapshot.catalog == parent.catalog
        and not is_other_engine(snapshot.engine, parent)  # of no rows, the files are the same
    )
