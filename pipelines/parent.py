"""What a run goes on from: does what it would embed fit beside the snapshot before it?

Knows nothing of how rows are embedded.
"""

from engine.backends.choice import Backend, Wanted
from pipelines.catalog import Catalog
from pipelines.errors import StoreError
from pipelines.planning import catalog_columns
from pipelines.schema import EmbeddingDtype
from pipelines.snapshots import EngineRecord, Snapshot
from pipelines.store import Store


def check_parent(
    parent: Snapshot | None,
    *,
    catalog: Catalog,
    engine: EngineRecord,
    backend: Backend,
    wanted: Wanted,
    dtype: EmbeddingDtype,
    store: Store,
) -> None:
    """Raise StoreError if embeddings of a run would not fit beside those of the snapshot before.

    Args:
        parent: That snapshot; None in an empty store, which takes all.
        catalog: What is to be embedded.
        engine: With what.
        backend: What executes it.
        wanted: What was asked for: a backend asked for by name may be another than before.
        dtype: Of stored embeddings.
        store: Whose snapshot it is.
    """
    if parent is None:
        return
    faults = []
    if parent.backend != backend and wanted == "auto":
        faults.append(
            f"embeddings by {parent.backend}, here it would be {backend}, whose last digits "
            f"differ (--backend {parent.backend} is the same, --backend {backend} mixes them)"
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
    if parent.key_type != str(catalog.key_type):
        faults.append(f"keys of type {parent.key_type}, the catalog's are {catalog.key_type}")
    carried = catalog_columns(catalog)["carry"]
    if parent.catalog.columns["carry"] != carried:
        faults.append(
            f"carried columns {parent.catalog.columns['carry']}, {carried} were asked for"
        )
    if parent.modalities != catalog.modalities:
        faults.append(f"{parent.modalities} of each key, the catalog has {catalog.modalities}")
    if parent.embedding_dtype != dtype:
        faults.append(f"{parent.embedding_dtype} embeddings, {dtype} was asked for")
    if faults:
        raise StoreError(
            f"store {store.uri} holds {'; '.join(faults)}. They never mix: name another --store, "
            "or embed with what this one was made with (--engine ID)"
        )


def same_state(snapshot: Snapshot, parent: Snapshot) -> bool:
    """Whether a snapshot would say nothing that the one before does not."""
    return set(snapshot.files) == set(parent.files) and snapshot.catalog == parent.catalog
