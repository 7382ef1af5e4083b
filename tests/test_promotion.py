"""The log of promotions: what is current, what came before, and who may become it."""

import json
from pathlib import Path

import pytest

from engine.errors import EngineError, GateError
from engine.gate_reports import add_gate_report
from engine.promotion import history, line_of_succession, promote, promoted, rollback, rollback_from
from engine.registry import Registry
from jobs.engine import main
from tests.engines import DIGEST, write_engine

A, B, C = "fp32-a", "fp32-b", "fp32-c"
FOLDER = f"promotions/{DIGEST[:16]}"


@pytest.fixture(params=["local", "memory"])
def registry(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Registry:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    is_local = request.param == "local"
    registry = Registry(str(tmp_path) if is_local else f"memory://{tmp_path.name}/engines")
    for engine_id in (A, B, C, "fp8-a", "fp16-a"):
        registry.obtain(engine_id, lambda path, name=engine_id: write_engine(path, engine_id=name))
    return registry


def files_of(registry: Registry) -> dict[str, bytes]:
    """Everything that is no promotion, by path."""
    directory = registry.local.directory
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and "promotions" not in path.parts
    }


def test_the_last_promotion_counts_and_touches_nothing_else(registry: Registry):
    before = files_of(registry)
    assert promoted(registry, DIGEST) is None
    first, second = promote(registry, A), promote(registry, B)
    assert promoted(registry, DIGEST) == B
    assert (first.engine_id, first.action, first.previous) == (A, "promote", None)
    assert (second.engine_id, second.action, second.previous) == (B, "promote", A)
    assert history(registry, DIGEST) == [first, second]
    assert registry.root.names(FOLDER) == ["00000001.json", "00000002.json"]
    assert json.loads(registry.root.read(f"{FOLDER}/00000002.json"))["engine_id"] == B
    assert files_of(registry) == before


def test_each_rollback_goes_one_further_back(registry: Registry):
    for engine_id in (A, B, C):
        promote(registry, engine_id)
    first = rollback(registry, DIGEST)
    assert (first.engine_id, first.action, first.previous) == (B, "rollback", C)
    assert rollback(registry, DIGEST).engine_id == A
    assert promoted(registry, DIGEST) == A
    with pytest.raises(EngineError, match=r"no engine .* to go back to: fp32-a is the first that"):
        rollback(registry, DIGEST)
    assert promoted(registry, DIGEST) == A
    assert len(history(registry, DIGEST)) == 5


def test_what_was_rolled_back_is_not_returned_to(registry: Registry):
    promote(registry, A)
    promote(registry, B)
    rollback(registry, DIGEST)
    promote(registry, C)
    assert line_of_succession(history(registry, DIGEST)) == [A, C]
    assert rollback(registry, DIGEST).engine_id == A
    promote(registry, B)
    assert line_of_succession(history(registry, DIGEST)) == [A, B]


def test_promoting_the_current_engine_changes_nothing(registry: Registry):
    promote(registry, A)
    entry = promote(registry, B)
    assert promote(registry, B) == entry
    assert len(history(registry, DIGEST)) == 2
    assert rollback(registry, DIGEST).engine_id == A


def test_nothing_was_ever_promoted(registry: Registry):
    with pytest.raises(EngineError, match="none was ever promoted"):
        rollback(registry, DIGEST)


@pytest.mark.parametrize("engine_id", ["fp8-a", "fp16-a"])
def test_only_a_passed_gate_leads_to_promotion(registry: Registry, engine_id: str):
    with pytest.raises(GateError, match=f"{engine_id} was never compared with fp32"):
        promote(registry, engine_id)
    add_gate_report(registry, engine_id, passed=True, files={"report.json": b"{}"})
    failed = add_gate_report(registry, engine_id, passed=False, files={"report.json": b"{}"})
    with pytest.raises(GateError, match=f"failed its gate at .* report is in .*{failed.path}"):
        promote(registry, engine_id)
    assert promoted(registry, DIGEST) is None
    add_gate_report(registry, engine_id, passed=True, files={"report.json": b"{}"})
    promote(registry, engine_id)
    assert promoted(registry, DIGEST) == engine_id


def test_an_engine_that_is_not_there_is_not_promoted(registry: Registry):
    with pytest.raises(GateError, match=r"no engine fp32-gone to promote; `clipmill engine list`"):
        promote(registry, "fp32-gone")


def test_an_engine_that_is_gone_is_not_rolled_back_to(registry: Registry):
    promote(registry, A)
    promote(registry, B)
    registry.root.remove(A)
    with pytest.raises(EngineError, match="fp32-a, which was promoted before fp32-b, is gone"):
        rollback(registry, DIGEST)
    assert promoted(registry, DIGEST) == B


def test_an_engine_that_failed_since_is_not_rolled_back_to(registry: Registry):
    for engine_id in ("fp8-a", "fp16-a"):
        add_gate_report(registry, engine_id, passed=True, files={})
        promote(registry, engine_id)
    add_gate_report(registry, "fp8-a", passed=False, files={})
    with pytest.raises(GateError, match=r"fp8-a failed its gate at .* `clipmill engine promote`"):
        rollback(registry, DIGEST)
    assert promoted(registry, DIGEST) == "fp16-a"
    add_gate_report(registry, "fp8-a", passed=True, files={})
    assert rollback(registry, DIGEST).engine_id == "fp8-a"


def test_a_rollback_from_the_current_engine_needs_no_checkpoint(registry: Registry):
    for engine_id in (A, B, C):
        promote(registry, engine_id)
    with pytest.raises(EngineError, match=r"fp32-b is not the current engine .*, fp32-c is"):
        rollback_from(registry, B)
    with pytest.raises(EngineError, match="no engine fp32-gone to roll back from"):
        rollback_from(registry, "fp32-gone")
    assert rollback_from(registry, C).engine_id == B
    assert promoted(registry, DIGEST) == B


def test_the_command_rolls_back_by_engine(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    registry = Registry(str(tmp_path))
    for engine_id in (A, B):
        registry.obtain(engine_id, lambda path, name=engine_id: write_engine(path, engine_id=name))
        promote(registry, engine_id)
    command = ["rollback", "--engines", str(tmp_path)]
    with pytest.raises(ValueError, match="engine fp32-b has a revision of its own"):
        main([*command, "--engine", B, "--revision", "main"])
    assert main([*command, "--engine", B]) == 0
    assert capsys.readouterr().out == "fp32-a is current again, after fp32-b\n"
    assert promoted(registry, DIGEST) == A
    for words in ([], ["--engine", A, "--checkpoint", "acme/clip"]):
        with pytest.raises(SystemExit) as stopped:
            main([*command, *words])
        assert stopped.value.code == 2


def test_checkpoints_have_logs_of_their_own(registry: Registry):
    other = "cd" * 32
    registry.obtain(
        "fp32-other",
        lambda path: write_engine(path, engine_id="fp32-other", checkpoint_digest=other),
    )
    promote(registry, A)
    promote(registry, "fp32-other")
    assert promoted(registry, DIGEST) == A
    assert promoted(registry, other) == "fp32-other"


def test_of_two_at_once_one_wins(registry: Registry, monkeypatch: pytest.MonkeyPatch):
    promote(registry, A)
    promote(registry, B)
    create = registry.root.create

    def overtaken(relative: str, content: bytes) -> None:
        create(relative, json.dumps({**json.loads(content), "engine_id": C}).encode())
        create(relative, content)

    for change in (lambda: promote(registry, A), lambda: rollback(registry, DIGEST)):
        with monkeypatch.context() as patch:
            patch.setattr(registry.root, "create", overtaken)
            with pytest.raises(EngineError, match=r"another promotion or rollback .* came first"):
                change()
        assert promoted(registry, DIGEST) == C


def test_two_at_once_may_promote_the_same(registry: Registry, monkeypatch: pytest.MonkeyPatch):
    promote(registry, A)
    create = registry.root.create

    def overtaken(relative: str, content: bytes) -> None:
        create(relative, json.dumps({**json.loads(content), "at": "a moment ago"}).encode())
        create(relative, content)

    with monkeypatch.context() as patch:
        patch.setattr(registry.root, "create", overtaken)
        entry = promote(registry, B)
    assert (entry.number, entry.engine_id, entry.at) == (2, B, "a moment ago")
    assert history(registry, DIGEST)[1:] == [entry]


def test_a_damaged_entry_is_named(registry: Registry):
    promote(registry, A)
    registry.root.publish(f"{FOLDER}/00000002.json", b"{")
    for ask in (lambda: promoted(registry, DIGEST), lambda: promote(registry, B)):
        with pytest.raises(EngineError, match=r"00000002\.json is damaged .* move it away"):
            ask()
