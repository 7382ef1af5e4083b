"""What a command says while it goes on: one line on stderr for each event.

Knows nothing of what happens. In a terminal the lines are for people, elsewhere JSON objects with
`time` (UTC), `level`, `event`, `command`, `run_id`, `snapshot`, `node`, `message` and fields of the
event. Ray's workers keep theirs in Ray's own log files.
"""

import json
import logging
import platform
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from rich.console import Console

from pipelines.error_lines import error_line
from pipelines.runs.run_journal import STOPS

# Of the project; what libraries say stays theirs.
LOGGERS = ("engine", "pipelines", "jobs")
_log = logging.getLogger(__name__)
_attached: list[logging.Handler] = []
_attaching = threading.Lock()


@dataclass(slots=True)
class LogContext:
    """What all lines of a command have in common."""

    command: str
    """Whose lines they are."""
    run_id: str | None = None
    """Of the run, for those that have one."""
    snapshot: int | None = None
    """The current one, once the run knows it."""
    node: str = ""
    """Where the command runs."""


@contextmanager
def event_log(command: str, *, run_id: str | None = None) -> Iterator[LogContext]:
    """Write what the project logs to stderr for the length of a block; its end by an error too."""
    context = LogContext(command=command, run_id=run_id, node=platform.node())
    is_terminal = Console(stderr=True).is_terminal
    handler = _StderrHandler()
    handler.setFormatter(PersonFormatter() if is_terminal else JsonFormatter(context))
    _attach(handler)
    try:
        yield context
    except BaseException as error:
        if not is_terminal:  # where the command's last line says it
            if isinstance(error, STOPS):
                _log.warning("stopped", extra=event("stopped"))
            else:
                _log.error(error_line(error), extra=event("failed"))
        raise
    finally:
        _detach(handler)


def _attach(handler: logging.Handler) -> None:
    with _attaching:
        _attached.append(handler)
        for name in LOGGERS:
            logger = logging.getLogger(name)
            logger.addHandler(handler)
            logger.setLevel(logging.INFO)
            logger.propagate = False


def _detach(handler: logging.Handler) -> None:
    """What others attached meanwhile, in other threads, stays at work."""
    with _attaching:
        _attached.remove(handler)
        for name in LOGGERS:
            logger = logging.getLogger(name)
            logger.removeHandler(handler)
            if not _attached:
                logger.setLevel(logging.NOTSET)
                logger.propagate = True


def event(name: str, /, **fields: Any) -> Mapping[str, Any]:
    """The `extra` of a logging call: what happened, and fields of it that JSON has."""
    return {"event": name, "fields": fields}


class JsonFormatter(logging.Formatter):
    """One JSON object for each event."""

    def __init__(self, context: LogContext) -> None:
        """`context` may change between events."""
        super().__init__()
        self._context = context

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record, without a break in it."""
        context = self._context
        line = {
            "time": _time(record).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": getattr(record, "event", record.name),
            "command": context.command,
            "run_id": context.run_id,
            "snapshot": context.snapshot,
            "node": context.node,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = record.exc_text or self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class PersonFormatter(logging.Formatter):
    """A line with the local time, and the level where it is not the usual one."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record."""
        level = f"{record.levelname.lower()}: " if record.levelno > logging.INFO else ""
        line = f"{_time(record).astimezone():%H:%M:%S} {level}{record.getMessage()}"
        if not record.exc_info:
            return line
        # What redaction has left of it, where it was at work.
        return f"{line}\n{record.exc_text or self.formatException(record.exc_info)}"


class _StderrHandler(logging.StreamHandler[Any]):
    """Writes to what stderr is at that moment: progress bars stand in for it meanwhile."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> Any:
        return sys.stderr


def _time(record: logging.LogRecord) -> datetime:
    return datetime.fromtimestamp(record.created, UTC)
