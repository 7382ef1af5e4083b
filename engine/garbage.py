"""What a registry can do without: leftovers, damage, and old engines that nobody promoted.

Knows nothing of who uses an engine: one that is in use, and not built from a checkpoint alone,
should be promoted. All ages are by the clock of the root's file system.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

from engine.errors import DamagedError, EngineError
from engine.inventory import published_at
from engine.manifest import MANIFEST_FILE
from engine.promotion import history, line_of_succession, promoted
from engine.publishing.artifacts import BUILDING_DIR, Artifact
from engine.publishing.folders import Folder
from engine.publishing.leases import LEASES_DIR
from engine.publishing.remote import FILES_DIR, read_record, stored_name
from engine.registry import (
    PLAN_FILE,
    PLANS_DIR,
    PROMOTIONS_DIR,
    Registry,
    engine_artifact,
    is_engine_id,
    plan_artifact,
)

# Off disks, what a builder has uploaded is no engine yet, and its lease the only sign of life. A
# beat comes every few seconds and an upload ends within a day.
BUILDING_SECONDS = 24 * 3600
_NOT_WHOLE = "damaged or never finished"


@dataclass(frozen=True, kw_only=True, slots=True)
class Retention:
    """Which engines stay."""

    max_age_days: float = 7.0
    """An engine that was never promoted stays so long, for its gate and for people to decide."""
    num_promotions: int = 3
    """Engines of so many last entries of a checkpoint's log stay, and of so many rollbacks."""

    def __post_init__(self) -> None:
        """Check the bounds."""
        if self.max_age_days < 0:
            raise ValueError(f"max_age_days={self.max_age_days}: expected at least 0")
        if self.num_promotions < 1:
            raise ValueError(f"num_promotions={self.num_promotions}: expected at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Garbage:
    """One file or folder to remove."""

    place: Literal["node", "root"]
    """This node's disk, or a root elsewhere."""
    path: str
    """Relative to where engines are kept there."""
    reason: str
    """For people."""
    num_bytes: int
    """Size."""


def find_garbage(registry: Registry, retention: Retention) -> list[Garbage]:
    """What can go, from the root and from this node.

    Compares all files on this node with their checksums. What somebody builds is not among it.

    Raises:
        EngineError: Something cannot be read, or is of a newer Clipmill.
    """
    return list(_garbage(registry, retention))


def remove_garbage(registry: Registry, retention: Retention) -> list[Garbage]:
    """Remove what can go; returns what went. EngineError as for finding, or if it cannot be."""
    removed = []
    for found in _garbage(registry, retention):
        if found.place == "root":
            # The record first: nobody shall find half an engine.
            for record in (MANIFEST_FILE, PLAN_FILE):
                registry.root.remove(f"{found.path}/{record}")
            registry.root.remove(found.path)
        elif found.path.startswith(BUILDING_DIR):
            _disk(registry).remove(found.path)
        else:
            registry.local.retire(found.path)
        removed.append(found)
    return removed


def _garbage(registry: Registry, retention: Retention) -> Iterator[Garbage]:
    """Each piece while those who could build there are locked out."""
    kept = _kept_engines(registry, retention)
    for path, reason in _on_node(registry, kept, retention):
        num_bytes = _disk(registry).num_bytes(path)
        yield Garbage(place="node", path=path, reason=reason, num_bytes=num_bytes)
    if not registry.root.is_local:
        for path, reason in _on_root(registry, kept, retention):
            num_bytes = registry.root.num_bytes(path)
            yield Garbage(place="root", path=path, reason=reason, num_bytes=num_bytes)


def _disk(registry: Registry) -> Folder:
    return Folder(str(registry.local.directory), called="engines", error=EngineError)


def _kept_engines(registry: Registry, retention: Retention) -> set[str]:
    kept: set[str] = set()
    for digest in registry.root.names(PROMOTIONS_DIR):
        log = history(registry, digest)
        kept |= {entry.engine_id for entry in log[-retention.num_promotions :]}
        kept |= set(line_of_succession(log)[-retention.num_promotions :])
    return kept


def _on_node(registry: Registry, kept: set[str], retention: Retention) -> Iterator[tuple[str, str]]:
    local = registry.local
    for leftover, path in local.leftovers().items():
        with local.idle(path) as is_idle:
            if is_idle:
                yield leftover.relative_to(local.directory).as_posix(), "left by a killed builder"
    for engine_id in filter(is_engine_id, local.folders("")):
        with local.idle(engine_id) as is_idle:
            reason = None
            if is_idle and engine_id not in kept:
                reason = _reason_on_node(registry, engine_id, retention)
            if reason is not None:
                yield engine_id, reason
                continue
        for plan_id in local.folders(f"{engine_id}/{PLANS_DIR}"):
            plan = plan_artifact(engine_id, plan_id)
            with local.idle(plan.path) as is_idle:
                if is_idle and local.find(plan) is None:
                    yield plan.path, _NOT_WHOLE


def _reason_on_node(registry: Registry, engine_id: str, retention: Retention) -> str | None:
    if registry.local.find(engine_artifact(engine_id)) is None:
        return _NOT_WHOLE
    if registry.root.is_local:
        return _old(registry, engine_id, retention)
    return "no longer on the root" if registry.manifest(engine_id) is None else None


def _on_root(registry: Registry, kept: set[str], retention: Retention) -> Iterator[tuple[str, str]]:
    for engine_id in registry.engine_ids():
        leases = f"{LEASES_DIR}/{engine_id}"
        if registry.root.names(leases) and _is_recent(registry, leases):
            continue
        if engine_id not in kept:
            if registry.manifest(engine_id) is None:
                if not _is_recent(registry, engine_id):
                    yield engine_id, _NOT_WHOLE
                continue
            reason = _old(registry, engine_id, retention)
            if reason is not None:
                yield engine_id, reason
                continue
        found = list(_unlisted(registry, engine_artifact(engine_id), is_kept=engine_id in kept))
        yield from found
        if (engine_id, _NOT_WHOLE) in found:
            continue
        for plan_id in registry.plan_ids(engine_id):
            yield from _unlisted(registry, plan_artifact(engine_id, plan_id), is_kept=False)
    for name in registry.root.names(LEASES_DIR):
        if not _is_recent(registry, f"{LEASES_DIR}/{name}"):
            yield f"{LEASES_DIR}/{name}", "leases of builders long done"


def _unlisted(
    registry: Registry, artifact: Artifact, *, is_kept: bool
) -> Iterator[tuple[str, str]]:
    """Of an artifact on a remote root the files that it does not list.

    All of it, unless it is to be kept, if its record is missing or malformed.
    """
    record = read_record(registry.root, artifact)
    files = None
    if record is not None:
        with suppress(DamagedError):  # as good as none
            files = artifact.files(record, path=registry.root.full_path(artifact.path))
    if files is None:
        if not is_kept and not _is_recent(registry, artifact.path):
            yield artifact.path, _NOT_WHOLE
        return
    listed = {stored_name(name, digest) for name, digest in files.items()}
    folder = f"{artifact.path}/{FILES_DIR}"
    for name in registry.root.names(folder):
        if name not in listed and not _is_recent(registry, f"{folder}/{name}"):
            yield f"{folder}/{name}", "part of no engine or plan"


def _old(registry: Registry, engine_id: str, retention: Retention) -> str | None:
    age = registry.root.current_time() - published_at(registry, engine_id)
    if age < timedelta(days=retention.max_age_days):
        return None
    manifest = registry.manifest(engine_id)
    if manifest is not None and promoted(registry, manifest.checkpoint_digest) == engine_id:
        return None  # since we began
    return f"neither promoted nor kept for a rollback, {age.days} days old"


def _is_recent(registry: Registry, path: str) -> bool:
    """Whether somebody may still be at work on what lies at a path on the root."""
    age = registry.root.current_time() - registry.root.modified_at(path)
    return age < timedelta(seconds=BUILDING_SECONDS)
