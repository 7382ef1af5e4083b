"""Tests of jobs/logs.py: a line for each event, for people in a terminal and JSON elsewhere."""

import json
import logging
import re
from datetime import UTC, datetime
from typing import Any

import pytest

from jobs.logs import LOGGERS, event, event_log
from jobs.stopping import Terminated

_log = logging.getLogger("pipelines.tested")


@pytest.fixture
def terminal(capsys, monkeypatch: pytest.MonkeyPatch):
    """What is written, as if stderr were a terminal."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    return capsys


def events(capsys: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_an_event_is_one_line_of_json_with_what_all_have(capsys):
    with event_log("nightly", run_id="20260301T031500-4fe2a1") as context:
        _log.info("a\nb", extra=event("progress", rows=7, names=["x"]))
        context.snapshot = 12
        _log.info("done: %d", 3, extra=event("ended"))
    first, second = events(capsys)
    written = datetime.fromisoformat(first.pop("time"))
    assert abs((datetime.now(UTC) - written).total_seconds()) < 60
    assert first.pop("node")
    assert first == {
        "level": "info",
        "event": "progress",
        "command": "nightly",
        "run_id": "20260301T031500-4fe2a1",
        "snapshot": None,
        "message": "a\nb",
        "rows": 7,
        "names": ["x"],
    }
    assert (second["snapshot"], second["message"], second["event"]) == (12, "done: 3", "ended")


def test_what_modules_warn_of_is_an_event_with_their_name(capsys):
    with event_log("embed"):
        logging.getLogger("engine.registry").warning("%s is damaged", "fp8-0")
        logging.getLogger("another.library").info("unheard")
    (said,) = events(capsys)
    assert (said["event"], said["level"]) == ("engine.registry", "warning")
    assert said["message"] == "fp8-0 is damaged"


def test_a_traceback_stays_within_the_line(capsys):
    with event_log("embed"):
        try:
            raise ValueError("odd")
        except ValueError:
            _log.exception("it failed")
    (said,) = events(capsys)
    assert "ValueError: odd" in said["traceback"]


def test_an_error_is_an_event_and_is_raised(capsys):
    with pytest.raises(RuntimeError), event_log("embed", run_id="r"):
        raise RuntimeError("cannot read s3://me:secret@bucket")
    (said,) = events(capsys)
    assert (said["event"], said["level"], said["run_id"]) == ("failed", "error", "r")
    assert said["message"] == "RuntimeError: cannot read s3://***@bucket"


@pytest.mark.parametrize("stop", [KeyboardInterrupt, Terminated, SystemExit])
def test_a_stop_by_hand_is_no_failure(capsys, stop):
    with pytest.raises(stop), event_log("embed", run_id="r"):
        raise stop
    (said,) = events(capsys)
    assert (said["event"], said["level"], said["message"]) == ("stopped", "warning", "stopped")


def test_a_terminal_gets_lines_for_people(terminal):
    with event_log("embed", run_id="r"):
        _log.info("from a to b", extra=event("begun", store="b"))
        _log.warning("slow: 4", extra=event("slow"))
    first, second = terminal.readouterr().err.splitlines()
    assert re.fullmatch(r"\d\d:\d\d:\d\d from a to b", first)
    assert re.fullmatch(r"\d\d:\d\d:\d\d warning: slow: 4", second)


def test_in_a_terminal_the_commands_last_line_says_the_error(terminal):
    with pytest.raises(RuntimeError), event_log("embed"):
        raise RuntimeError("bad")
    assert terminal.readouterr().err == ""


def test_afterwards_all_is_as_it_was(capsys):
    def state() -> list[Any]:
        loggers = [logging.getLogger(name) for name in LOGGERS]
        return [(logger.level, logger.propagate, list(logger.handlers)) for logger in loggers]

    before = state()
    with event_log("embed"):
        assert state() != before
    assert state() == before
    _log.info("unheard")
    assert capsys.readouterr().err == ""


def test_two_logs_that_overlap_leave_the_loggers_as_they_were():
    """As of two runs in threads of one process."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    first, second = event_log("embed"), event_log("nightly")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert all(len(logger.handlers) == 1 for logger in loggers)
    second.__exit__(None, None, None)
    assert all(logger.propagate and not logger.handlers for logger in loggers)
    assert all(logger.level == logging.NOTSET for logger in loggers)
