"""What says a secret in all ways in which a worker of Ray can."""

import gc
import logging
import sys
import threading
import warnings

import pyarrow as pa


class Fragile:
    """Fails where nobody can catch it."""

    def __init__(self, uri: str) -> None:
        self._uri = uri

    def __del__(self) -> None:
        raise RuntimeError(f"ignored at {self._uri}")


def decode(table: pa.Table, *, secret: str, meter: None) -> pa.Table:
    """Logs, warns, and fails in places that nobody looks at; the last line is `said it`."""
    uri = f"s3://AKIA:{secret}@bucket/a"

    def fail(what: str) -> None:
        raise RuntimeError(f"{what} at {uri}")

    thread = threading.Thread(target=fail, args=("a thread",))
    thread.start()
    thread.join()
    Fragile(uri)
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn(f"a warning of {uri}", stacklevel=1)
    logging.getLogger("tests.loud").warning("a log of %s", uri)
    try:
        fail("a logged error")
    except RuntimeError:
        logging.getLogger("tests.loud").exception("a traceback")
    sys.stderr.write("said it\n")
    return table


def failing_stage(secret: str) -> "FailingStage":
    """A stage that fails."""
    return FailingStage(secret)


class FailingStage:
    """Fails with a secret in its error."""

    def __init__(self, secret: str) -> None:
        self._secret = secret

    def __call__(self, table: pa.Table) -> pa.Table:
        raise RuntimeError(f"a stage at s3://AKIA:{self._secret}@bucket/a")
