"""What lies in a registry: its engines, with plans, gate, promotion and size.

Knows nothing of what should lie there.
"""

from dataclasses import dataclass
from datetime import datetime

from engine.errors import PlanError
from engine.gate_reports import last_gate
from engine.manifest import MANIFEST_FILE, Manifest
from engine.plans.plan import PlanRecord, parse_plan
from engine.promotion import promoted
from engine.publishing.remote import read_record
from engine.registry import Registry, plan_artifact


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineEntry:
    """An engine as its root has it; its files are not compared with their checksums."""

    manifest: Manifest
    """What it is."""
    published_at: str
    """UTC, ISO 8601."""
    is_promoted: bool
    """Whether it is the current one of its checkpoint."""
    gate_passed: bool | None
    """Of its last gate; None if it has none."""
    plan_ids: tuple[str, ...]
    """Its plans."""
    num_bytes: int
    """Of all its files, plans and reports."""

    @property
    def engine_id(self) -> str:
        """Its name."""
        return self.manifest.engine_id


def engine_entry(registry: Registry, engine_id: str) -> EngineEntry | None:
    """One engine; None if there is none of that name.

    Raises:
        EngineError: The root cannot be read, or a record on it is damaged.
    """
    manifest = registry.manifest(engine_id)
    if manifest is None:
        return None
    gate = last_gate(registry, engine_id)
    return EngineEntry(
        manifest=manifest,
        published_at=published_at(registry, engine_id).isoformat(timespec="seconds"),
        is_promoted=promoted(registry, manifest.checkpoint_digest) == engine_id,
        gate_passed=None if gate is None else gate.passed,
        plan_ids=tuple(
            plan_id
            for plan_id in registry.plan_ids(engine_id)
            if read_record(registry.root, plan_artifact(engine_id, plan_id)) is not None
        ),
        num_bytes=registry.root.num_bytes(engine_id),
    )


def plan_records(registry: Registry, engine_id: str) -> dict[str, PlanRecord | None]:
    """The records of an engine's plans by id, None for one that cannot be read; EngineError."""
    found: dict[str, PlanRecord | None] = {}
    for plan_id in registry.plan_ids(engine_id):
        artifact = plan_artifact(engine_id, plan_id)
        content = read_record(registry.root, artifact)
        if content is None:
            continue
        try:
            found[plan_id] = parse_plan(content, path=registry.root.full_path(artifact.path))
        except PlanError:
            found[plan_id] = None
    return found


def list_engines(registry: Registry) -> list[EngineEntry]:
    """All engines, the newest first; EngineError as for one."""
    entries = (engine_entry(registry, engine_id) for engine_id in registry.engine_ids())
    found = [entry for entry in entries if entry is not None]
    return sorted(found, key=lambda entry: entry.published_at, reverse=True)


def published_at(registry: Registry, engine_id: str) -> datetime:
    """When an engine was put in place; EngineError if there is none."""
    return registry.root.modified_at(f"{engine_id}/{MANIFEST_FILE}")
