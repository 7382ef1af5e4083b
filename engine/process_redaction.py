"""Keeps credentials out of what a process logs, warns of, and writes of its errors.

Knows nothing of how credentials are told: `engine.redaction` does.
"""

import logging
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from types import FunctionType, TracebackType
from typing import Any

from engine.redaction import redacted


def redact_process() -> None:
    """Keep credentials out of what this process logs, warns of, and writes of errors on stderr.

    May be called again. Hooks for errors of threads, and of what nobody waits for, stay those of
    others where there are any.
    """
    make_record = logging.getLogRecordFactory()
    if not isinstance(make_record, _RedactedRecords):
        logging.setLogRecordFactory(_RedactedRecords(make_record))
    sys.excepthook = _print_redacted
    if threading.excepthook is threading.__excepthook__:
        threading.excepthook = _print_of_thread
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = _print_unraisable
    if not isinstance(warnings.formatwarning, _RedactedWarnings):
        warnings.formatwarning = _RedactedWarnings(warnings.formatwarning)


class _RedactedRecords:
    """Makes log records as another factory does, without credentials."""

    def __init__(self, make_record: Callable[..., logging.LogRecord]) -> None:
        self._make_record = make_record

    def __call__(self, *args: Any, **kwargs: Any) -> logging.LogRecord:
        record = self._make_record(*args, **kwargs)
        try:
            said = record.getMessage()
        except Exception:  # noqa: BLE001, whatever an argument raises: logging would show them all
            said = f"{_shown(record.msg, str)} {_shown(record.args, repr)}"
            record.msg, record.args = said, ()
        public = redacted(said)
        if public != said:  # else as it is: some formatters want the arguments apart
            record.msg, record.args = public, ()
        if record.exc_info:
            # Formatters take this where it is there, and do not look at the exception.
            record.exc_text = redacted(
                "".join(traceback.format_exception(*record.exc_info))
            ).rstrip()
        return record


def _shown(thing: object, show: Callable[[object], str]) -> str:
    try:
        return show(thing)
    except Exception:  # noqa: BLE001, what is logged must not raise into who logs
        return object.__repr__(thing)


class _RedactedWarnings:
    """Formats warnings as another function does, without credentials."""

    def __init__(self, format_warning: Callable[..., str]) -> None:
        self._format_warning = format_warning

    def __call__(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        line: str | None = None,
    ) -> str:
        return redacted(self._format_warning(message, category, filename, lineno, line))


def _print_redacted(
    kind: type[BaseException],
    error: BaseException | None,
    trace: TracebackType | None,
    *,
    before: str = "",
) -> None:
    said = "".join(traceback.format_exception(kind, error, trace))
    sys.stderr.write(redacted(f"{before}{said}"))


def _print_of_thread(args: threading.ExceptHookArgs) -> None:
    if args.exc_type is SystemExit:
        return
    name = args.thread.name if args.thread is not None else threading.get_ident()
    before = f"Exception in thread {name}:\n"
    _print_redacted(args.exc_type, args.exc_value, args.exc_traceback, before=before)


def _print_unraisable(args: "sys.UnraisableHookArgs") -> None:
    # Other attributes, and `repr`, may be any code of an object that is half gone.
    thing = args.object
    name = thing.__qualname__ if type(thing) is FunctionType else object.__repr__(thing)
    before = f"{args.err_msg or 'Exception ignored in'}: {name}\n"
    _print_redacted(args.exc_type, args.exc_value, args.exc_traceback, before=before)
