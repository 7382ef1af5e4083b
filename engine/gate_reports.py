"""The reports of an engine's gate: numbered, never changed, the last one counts.

Knows nothing of what a gate measures.

    ENGINES/fp8-0011223344556677/gates/00000001/   the report's files, `gate.json` last
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from engine.errors import EngineError, GateError
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


def check_gate(registry: Registry, engine_id: str) -> None:
    """Raise GateError unless an engine may be promoted and used.

    It may if its last gate passed; fp32, which all others are measured by, has none.

    Raises:
        GateError: Its last gate failed or never ran, or there is no such engine.
        EngineError: The root cannot be read, or the report is damaged.
    """
    if engine_id.startswith("fp32-"):
        return
    manifest = registry.manifest(engine_id)
    if manifest is None:
        raise GateError(
            f"engines {registry.uri}: no engine {engine_id}; `clipmill engine list` shows those "
            "there are"
        )
    gate = last_gate(registry, engine_id)
    if gate is not None and gate.passed:
        return
    what = "was never compared with fp32" if gate is None else f"failed its gate at {gate.at}"
    where = "" if gate is None else f"; the report is in {registry.root.full_path(gate.path)}"
    raise GateError(
        f"engine {engine_id} {what}, so it is neither promoted nor used{where}. Compare it again "
        "with `clipmill engine build`, or make another current with `clipmill engine promote` or "
        f"`clipmill engine rollback --checkpoint {manifest.checkpoint}`"
    )
