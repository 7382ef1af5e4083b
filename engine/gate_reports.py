"""The reports of an engine's gate: numbered, never changed, the last one counts.

Knows nothing of what a gate measures.

    ENGINES/fp8-0011223344556677/gates/00000001/   the report's files, `gate.json` last
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from engine.errors import EngineError
from engine.registry import Registry

_GATES_DIR, _GATE_FILE = "gates", "gate.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class GateResult:
    """What came out of one run of an engine's gate."""

    path: str
    """Of the report's folder, relative to where engines are kept."""
    passed: bool
    """Whether the engine may be promoted."""
    at: str
    """UTC, ISO 8601; for people: order is by number."""


def add_gate_report(
    registry: Registry, engine_id: str, *, passed: bool, files: Mapping[str, bytes]
) -> GateResult:
    """Keep a report beside its engine.

    Args:
        registry: Where the engine is.
        engine_id: Which.
        passed: Whether it may be promoted.
        files: Name -> content, for people and programs.

    Raises:
        EngineError: There is no such engine, or the root cannot be written.
    """
    if registry.manifest(engine_id) is None:
        raise EngineError(
            f"engines {registry.uri}: no engine {engine_id}; run `clipmill engine build`"
        )
    at = datetime.now(UTC).isoformat(timespec="seconds")
    record = json.dumps({"passed": passed, "at": at}).encode()
    numbers = registry.root.names(f"{engine_id}/{_GATES_DIR}")
    number = int(numbers[-1]) if numbers else 0
    while True:
        number += 1
        path = f"{engine_id}/{_GATES_DIR}/{number:08d}"
        try:
            for name, content in (*files.items(), (_GATE_FILE, record)):
                registry.root.create(f"{path}/{name}", content)
        except FileExistsError:  # another report took the number meanwhile
            continue
        return GateResult(path=path, passed=passed, at=at)


def last_gate(registry: Registry, engine_id: str) -> GateResult | None:
    """The last finished report of an engine, None if there is none; EngineError if damaged."""
    for number in reversed(registry.root.names(f"{engine_id}/{_GATES_DIR}")):
        path = f"{engine_id}/{_GATES_DIR}/{number}"
        record = registry.root.read_if_there(f"{path}/{_GATE_FILE}")
        if record is None:
            continue
        try:
            fields = json.loads(record)
            return GateResult(path=path, passed=bool(fields["passed"]), at=str(fields["at"]))
        except (ValueError, KeyError, TypeError) as error:
            raise EngineError(
                f"engines {registry.uri}: {path}/{_GATE_FILE} is damaged ({error}); remove that "
                "folder and check the engine again with `clipmill engine build`"
            ) from error
    return None
