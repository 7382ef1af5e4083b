"""Which TensorRT is installed here, and what it says.

Knows nothing of plans or networks, and imports neither library before it is asked for one.
"""

import functools
import importlib
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from engine.errors import DeviceError
from engine.plans.plan import Flavour

# Modules by which each is imported: the package's own name, and that of the bare wheel.
MODULES: dict[Flavour, tuple[str, ...]] = {
    "tensorrt": ("tensorrt",),
    "tensorrt_rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings"),
}
INSTALL: dict[Flavour, str] = {
    "tensorrt": "pip install 'clipmill[gpu]'",
    "tensorrt_rtx": "pip install 'clipmill[rtx]'",
}
_KEPT_ERRORS = 20


class MessageLog:
    """What a library said, kept instead of printed."""

    def __init__(self) -> None:
        """Start with nothing said."""
        self._errors: deque[str] = deque(maxlen=_KEPT_ERRORS)
        self._recording: list[str] | None = None
        self._recorder = threading.Lock()

    def add(self, message: str) -> None:
        """Take a message, which is kept only while somebody records."""
        if self._recording is not None:
            self._recording.append(message)

    def add_error(self, message: str) -> None:
        """Take an error, which is kept until the next operation begins."""
        self._errors.append(message)
        self.add(message)

    def begin(self) -> None:
        """Forget earlier errors: an operation begins."""
        self._errors.clear()

    @property
    def errors(self) -> str:
        """The errors since the operation began, in one line."""
        return "; ".join(dict.fromkeys(self._errors)) or "it gave no reason"

    @contextmanager
    def recording(self) -> Iterator[list[str]]:
        """Collect all messages of an operation; another that would record waits for its end."""
        with self._recorder:
            self.begin()
            messages: list[str] = []
            self._recording = messages
            try:
                yield messages
            finally:
                self._recording = None


@dataclass(frozen=True, kw_only=True)
class Library:
    """A TensorRT that is installed here."""

    flavour: Flavour
    """Which of the two."""
    version: str
    """In full: a plan loads under no other."""
    api: Any
    """Its module."""
    log: MessageLog
    """What it says."""
    logger: Any
    """Its `ILogger` that writes into `log`. There is one in a process: the library keeps the first
    that it is given, and would go on writing to it."""

    @property
    def major_version(self) -> int:
        """Of TensorRT; TensorRT for RTX counts on its own."""
        return int(self.version.split(".")[0])


def installed_library(flavour: Flavour | None = None) -> Library:
    """Import TensorRT.

    Args:
        flavour: Which; None for TensorRT, or TensorRT for RTX where it is the only one.

    Raises:
        DeviceError: It is not installed, or cannot be loaded.
    """
    for name in MODULES if flavour is None else (flavour,):
        library = _imported(name)
        if library is not None:
            return library
    if flavour is None:
        raise DeviceError(
            f"no TensorRT here: {INSTALL['tensorrt']}, or for GeForce and RTX cards "
            f"{INSTALL['tensorrt_rtx']}"
        )
    raise DeviceError(f"no {flavour} here: {INSTALL[flavour]}")


@functools.cache
def _imported(flavour: Flavour) -> Library | None:
    for name in MODULES[flavour]:
        try:
            api = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise DeviceError(f"{name} is installed, but not whole: {error}") from error
            continue
        except (ImportError, OSError) as error:
            raise DeviceError(
                f"{name} is installed, but cannot be loaded ({error}); {INSTALL[flavour]} anew"
            ) from error
        log = MessageLog()
        return Library(
            flavour=flavour, version=api.__version__, api=api, log=log, logger=_logger(api, log)
        )
    return None


def _logger(api: Any, log: MessageLog) -> Any:
    is_error = (api.ILogger.INTERNAL_ERROR, api.ILogger.ERROR)

    class Logger(api.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            # The binding's base refuses super().__init__().
            api.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in is_error:
                log.add_error(message)
            else:
                log.add(message)

    return Logger()
