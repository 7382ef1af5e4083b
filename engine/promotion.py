"""Which engine of a checkpoint is current: an append-only log of promotions and rollbacks.

Knows nothing of what makes an engine good, only whether its gate passed.

    ENGINES/promotions/0011223344556677/00000001.json    named for the checkpoint's digest
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from engine.errors import EngineError, GateError
from engine.gate_reports import check_gate
from engine.registry import PROMOTIONS_DIR, Registry


@dataclass(frozen=True, kw_only=True, slots=True)
class Promotion:
    """One entry of the log."""

    number: int
    """Counts from 1."""
    engine_id: str
    """Current from this entry on."""
    action: Literal["promote", "rollback"]
    """What a person or a job did."""
    at: str
    """UTC, ISO 8601; for people: order is by number."""
    previous: str | None
    """Current before this entry."""


def promote(registry: Registry, engine_id: str) -> Promotion:
    """Make an engine the current one of its checkpoint; if it is already, nothing changes.

    Raises:
        GateError: There is no such engine, or it is not fp32, which all others are measured by,
            and its gate did not pass.
        EngineError: A promotion of another or a rollback came first, or the root cannot be written.
    """
    manifest = registry.manifest(engine_id)
    if manifest is None:
        raise GateError(
            f"engines {registry.uri}: no engine {engine_id} to promote; `clipmill engine list` "
            "shows those there are"
        )
    check_gate(registry, engine_id)
    log = history(registry, manifest.checkpoint_digest)
    if log and log[-1].engine_id == engine_id:
        return log[-1]
    return _append(registry, manifest.checkpoint_digest, log, engine_id, action="promote")


def rollback(registry: Registry, checkpoint_digest: str) -> Promotion:
    """Make the engine current that was so before the current one was promoted.

    Again, and it is the one before that: of A, B and C promoted, two rollbacks lead to A. What was
    rolled back is never returned to, except by promoting it.

    Raises:
        GateError: The one before has failed its gate since.
        EngineError: There is none before, or it is gone; another promotion or rollback came first;
            or the root cannot be written.
    """
    log = history(registry, checkpoint_digest)
    engines = line_of_succession(log)
    if len(engines) < 2:
        current = f"{engines[0]} is the first that was" if engines else "none was ever"
        raise EngineError(
            f"engines {registry.uri}: no engine of checkpoint {checkpoint_digest[:16]} to go back "
            f"to: {current} promoted. Promote one with `clipmill engine promote`"
        )
    if registry.manifest(engines[-2]) is None:
        raise EngineError(
            f"engines {registry.uri}: {engines[-2]}, which was promoted before {engines[-1]}, is "
            "gone; promote another with `clipmill engine promote`"
        )
    check_gate(registry, engines[-2])
    return _append(registry, checkpoint_digest, log, engines[-2], action="rollback")


def rollback_from(registry: Registry, engine_id: str) -> Promotion:
    """The same, named by the engine that is current; its checkpoint may have moved or be gone.

    Raises:
        GateError, EngineError: As for `rollback`; there is no such engine; or it is not current.
    """
    manifest = registry.manifest(engine_id)
    if manifest is None:
        raise EngineError(
            f"engines {registry.uri}: no engine {engine_id} to roll back from; `clipmill engine "
            "list` shows those there are"
        )
    current = promoted(registry, manifest.checkpoint_digest)
    if current != engine_id:
        raise EngineError(
            f"engines {registry.uri}: {engine_id} is not the current engine of its checkpoint, "
            f"{current or 'none'} is; nothing was changed"
        )
    return rollback(registry, manifest.checkpoint_digest)


def promoted(registry: Registry, checkpoint_digest: str) -> str | None:
    """The id of a checkpoint's current engine, None if none was promoted; EngineError."""
    entries = registry.root.list(_folder(checkpoint_digest), suffix=".json")
    return _read(registry, entries[-1]).engine_id if entries else None


def history(registry: Registry, checkpoint_digest: str) -> list[Promotion]:
    """All entries of a checkpoint's log, oldest first; EngineError."""
    entries = registry.root.list(_folder(checkpoint_digest), suffix=".json")
    return [_read(registry, path) for path in entries]


def line_of_succession(log: Sequence[Promotion]) -> list[str]:
    """The current engine, last, after those that rolling back leads to one by one."""
    engines: list[str] = []
    for entry in log:
        if entry.action == "rollback":
            engines = engines[:-2]
        engines.append(entry.engine_id)
    return engines


def _append(
    registry: Registry,
    checkpoint_digest: str,
    log: Sequence[Promotion],
    engine_id: str,
    *,
    action: Literal["promote", "rollback"],
) -> Promotion:
    entry = Promotion(
        number=log[-1].number + 1 if log else 1,
        engine_id=engine_id,
        action=action,
        at=datetime.now(UTC).isoformat(timespec="seconds"),
        previous=log[-1].engine_id if log else None,
    )
    path = f"{_folder(checkpoint_digest)}/{entry.number:08d}.json"
    try:
        registry.root.create(path, (json.dumps(dataclasses.asdict(entry)) + "\n").encode())
    except FileExistsError:
        last = history(registry, checkpoint_digest)[-1]
        if action == "promote" and last.engine_id == engine_id:
            return last  # somebody else wanted the same
        raise EngineError(
            f"engines {registry.uri}: another promotion or rollback of checkpoint "
            f"{checkpoint_digest[:16]} came first and counts; look with `clipmill engine list`, "
            f"and {action} again if that is still right"
        ) from None
    return entry


def _folder(checkpoint_digest: str) -> str:
    return f"{PROMOTIONS_DIR}/{checkpoint_digest[:16]}"


def _read(registry: Registry, path: str) -> Promotion:
    try:
        return Promotion(**json.loads(registry.root.read(path)))
    except (ValueError, TypeError) as error:
        raise EngineError(
            f"engines {registry.uri}: {path} is damaged ({error}); move it away, and promote the "
            "engine that should be current"
        ) from error
