"""The process of its own that `pipelines.resilience.isolation` lets do what others died of.

Knows nothing of what it does: that comes through the pipe. It ends when the other side is gone,
also in the middle of a call, which may hold a GPU.
"""

import os
import pickle
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import pyarrow as pa

from engine.errors import DeviceLostError
from engine.process_redaction import redact_process
from pipelines.arrow_files import read_stream

# The first byte of each answer: what follows is a table (or nothing), the text of a fault after
# which this process is of no use, or an error, pickled.
DONE, LOST, FAILED = b"+", b"!", b"-"
PARENT_POLL_SECONDS = 1.0

StageFunction = Callable[[pa.Table], pa.Table]


def packed(table: pa.Table) -> memoryview:
    """A table as bytes; of a slice, only the slice."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return memoryview(sink.getvalue())


def _main(pipe: Connection) -> None:
    redact_process()  # what it writes is in the log of the worker that started it
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    asked = _next(pipe)
    if asked is None:
        return
    try:
        stage: StageFunction = pickle.loads(asked)()
        pipe.send_bytes(DONE)
        while (asked := _next(pipe)) is not None:
            pipe.send_bytes(DONE + bytes(packed(stage(read_stream(asked)))))
    except DeviceLostError as error:
        pipe.send_bytes(LOST + str(error).encode())
    except Exception as error:
        pipe.send_bytes(FAILED + _pickled(error))
        raise


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(PARENT_POLL_SECONDS)
    os._exit(1)


def _next(pipe: Connection) -> bytes | None:
    try:
        return pipe.recv_bytes()
    except EOFError:
        return None


def _pickled(error: Exception) -> bytes:
    try:
        content = pickle.dumps(error)
        pickle.loads(content)
    except (pickle.PicklingError, TypeError, AttributeError):
        return pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))
    return content


if __name__ == "__main__":
    _main(Connection(int(sys.argv[1])))
