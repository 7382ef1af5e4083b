"""Indexes a snapshot, each modality by itself: keeps, updates or builds, measures, promotes.

Knows nothing of how the embeddings were made or who will query them. What an index is:
`pipelines.indexes.manifest`.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

from pipelines.errors import PipelineError, RecallError
from pipelines.indexes import recall
from pipelines.indexes.asked_queries import asked_hash
from pipelines.indexes.choice import Recipe, named_recipe
from pipelines.indexes.making import make_index, update_index
from pipelines.indexes.manifest import (
    IndexManifest,
    damaged_file,
    find_index,
    index_dir,
    indexed_files,
    publish_index,
    remove_other_builds,
)
from pipelines.indexes.opening import (
    open_build,
)
from pipelines.indexes.options import IndexOptions, recipe_for
from pipelines.indexes.row_changes import (
    all_rows_coming,
    find_row_changes,
)
from pipelines.indexes.updating import Parent
from pipelines.schema import Modality
from pipelines.snapshots import Snapshot, is_other_engine, read_snapshot, snapshot_numbers
from pipelines.store import Store

_log = logging.getLogger(__name__)
# Of the rows that an index was trained on: when more came, went or changed, it is built anew.
MAX_CHANGED_SHARE = 0.3
# When more are free, keys get new ids.
MAX_IDS_PER_ROW = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexConfig:
    """Which store to index, and how."""

    store_uri: str
    """A store with at least one snapshot."""
    snapshot: int | None = None
    """Its number; None: the current one."""
    options: IndexOptions = field(default_factory=IndexOptions)
    """What the index shall be."""


def build_index(config: IndexConfig) -> list[IndexManifest]:
    """Index a snapshot, each modality by itself; an index that is there is kept.

    Raises:
        StoreError: There is no such snapshot, or the store cannot be read or written.
        PipelineError: No index fits in the memory allowed; or there is one of another type than the
            one that is named.
        RecallError: An index finds less than was asked for; it is not promoted.
    """
    store = Store(config.store_uri)
    snapshot = read_snapshot(store, config.snapshot)
    _check_type(store, snapshot, options=config.options)
    return index_snapshot(store, snapshot, options=config.options, promote=check_recall)


def check_recall(manifest: IndexManifest) -> None:
    """Raise RecallError if an index finds less than was asked for."""
    short = {
        kind: found
        for kind, found in manifest.recall_at(recall.CHOSEN_K).items()
        if found < manifest.min_recall
    }
    if short:
        words = ", ".join(f"{found:.3f} of {kind} queries" for kind, found in short.items())
        raise RecallError(
            f"index of {manifest.modality} embeddings ({manifest.factory}): recall@10 is {words}, "
            f"{manifest.min_recall:g} was asked for; it is not promoted. Allow more memory "
            "(--max-memory-bytes), name another --factory, or ask for less (--min-recall)"
        )


def index_snapshot(
    store: Store,
    snapshot: Snapshot,
    *,
    options: IndexOptions,
    promote: Callable[[IndexManifest], None],
) -> list[IndexManifest]:
    """Index a snapshot, also one that is not committed yet; an index that is there is kept.

    Args:
        store: Where its files lie.
        snapshot: Each of its modalities is indexed by itself.
        options: What the indexes shall be.
        promote: Called before an index is there for readers; raises if it shall not be.

    Raises:
        StoreError: The store cannot be read or written.
        PipelineError: No index fits in the memory allowed.
    """
    manifests = []
    for modality in snapshot.modalities:
        manifest = find_index(store, snapshot, modality=modality)
        if manifest is not None and (name := damaged_file(store, manifest)) is not None:
            _log.warning(
                "the index of %s embeddings is damaged (%s is not what was written), and built "
                "again",
                modality,
                name,
            )
            # What a build finds it goes on with. The manifest stays: killed, this comes again.
            store.remove(manifest.folder)
            manifest = None
        if manifest is None:
            manifest = _indexed(store, snapshot, modality=modality, options=options)
            promote(manifest)
            publish_index(store, manifest)
            remove_other_builds(store, manifest)
        manifests.append(manifest)
    return manifests


def _check_type(store: Store, snapshot: Snapshot, *, options: IndexOptions) -> None:
    """PipelineError if there is an index of another type than the one that is named."""
    for modality in snapshot.modalities:
        found = find_index(store, snapshot, modality=modality)
        if found and damaged_file(store, found) is not None:
            continue  # it is built again
        if found and found.num_rows and options.factory not in (None, found.factory):
            raise PipelineError(
                f"factory={options.factory}: snapshot {snapshot.number} has an index of its "
                f"{modality} embeddings already, {found.factory}, which is kept; to have another, "
                f"remove {store.full_path(index_dir(snapshot, modality=modality))} first (until "
                "then nobody can query that snapshot), or leave --factory out"
            )


def _indexed(
    store: Store, snapshot: Snapshot, *, modality: Modality, options: IndexOptions
) -> IndexManifest:
    """An index, whole and measured, that no reader sees yet."""
    num_rows = snapshot.num_rows("embeddings", modality=modality)
    recipe = recipe_for(options, num_rows=num_rows, embedding_dim=snapshot.embedding_dim)
    make = partial(make_index, store, snapshot, modality=modality, options=options)
    parent = _parent(store, snapshot, modality=modality)
    if parent is None:
        return make(recipe, parent=None)
    obstacle = _obstacle(snapshot, parent, recipe=recipe, options=options)
    if obstacle is None:
        same = replace(
            named_recipe(
                parent.index.manifest.factory,
                num_rows=num_rows,
                embedding_dim=snapshot.embedding_dim,
            ),
            reason=f"index of snapshot {parent.snapshot.number} with "
            f"{parent.changes.num_coming:,} rows that came or changed, and without "
            f"{len(parent.changes.removed_ids):,} that went",
        )
        manifest = update_index(
            store, snapshot, same, modality=modality, options=options, parent=parent
        )
        if min(manifest.recall_at(recall.CHOSEN_K).values(), default=1.0) >= options.min_recall:
            return manifest
        obstacle = f"updated, it found less than {options.min_recall:g}"
    if parent.index.manifest.num_ids > MAX_IDS_PER_ROW * num_rows:
        return make(recipe, parent=None)  # most ids are free, and take their place
    return make(replace(recipe, reason=f"{recipe.reason}; built anew: {obstacle}"), parent=parent)


def _parent(store: Store, snapshot: Snapshot, *, modality: Modality) -> Parent | None:
    """The index of the nearest snapshot before that has one."""
    number = snapshot.parent
    numbers = set(snapshot_numbers(store))
    while number in numbers:
        before = read_snapshot(store, number)
        manifest = find_index(store, before, modality=modality)
        if before.key_type != snapshot.key_type:
            return None
        if manifest is not None and damaged_file(store, manifest) is None:
            index = open_build(store, manifest)
            after = indexed_files(snapshot, modality=modality)
            changes = (
                all_rows_coming(store, index.rows, after=after)
                # Of a row that changed and changed back, the carried columns may be others.
                if is_other_engine(snapshot.engine, before)
                or (number != snapshot.parent and len(index.rows.schema) > 1)
                else find_row_changes(
                    store, index.rows, before=indexed_files(before, modality=modality), after=after
                )
            )
            return Parent(snapshot=before, index=index, changes=changes)
        number = before.parent
    return None


def _obstacle(
    snapshot: Snapshot, parent: Parent, *, recipe: Recipe, options: IndexOptions
) -> str | None:
    """Why an index is not made from that before, None if it is."""
    manifest, changes = parent.index.manifest, parent.changes
    if is_other_engine(snapshot.engine, parent.snapshot):
        return "another engine"
    if recipe.kind != "ivf" or manifest.kind != "ivf":
        return "only inverted lists are changed"
    if options.factory is not None and options.factory != manifest.factory:
        return f"{options.factory} was asked for by name, it was {manifest.factory}"
    if options.factory is None and _code(recipe.factory) != _code(manifest.factory):
        return f"{recipe.factory} is the best that fits now, it was {manifest.factory}"
    if asked_hash(options) != manifest.asked:
        return "its recall was measured with other queries"
    coming_bytes = 4 * snapshot.embedding_dim * changes.num_coming
    if 2 * coming_bytes > options.memory_bytes:
        return f"what comes takes {coming_bytes:,} bytes"
    share = (manifest.num_changed_rows + changes.num_all) / max(manifest.num_trained_rows, 1)
    if share > MAX_CHANGED_SHARE:
        return f"{share:.0%} of the rows that it was trained on came, went or changed since"
    return None


def _code(factory: str) -> str:
    return factory.partition(",")[2]
