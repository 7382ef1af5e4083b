"""Opens Parquet and Arrow files that others may have written: none of them brings code along.

Knows nothing of what they hold.

A file may say that a column is of one of Ray Data's types. Ray then unpickles their description, if
$RAY_DATA_AUTOLOAD_CLOUDPICKLE_TENSOR_METADATA says that all files are trusted, and unpickles values
of its type for Python objects in any case. Here neither happens, in the whole process from the
first file on: no column of ours is of these types.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

_TENSOR_TYPES = "ray.data._internal.tensor_extensions.arrow"
_OBJECT_TYPE = "ray.data.arrow_pickled_object"
# How Ray begins to say so of a pickle.
_REFUSED = "Unable to deserialize"


def open_parquet(source: Any, *, buffer_size: int = 0, pre_buffer: bool = True) -> pq.ParquetFile:
    """As `pq.ParquetFile`; ArrowInvalid for a type that only a pickle describes."""
    _keep_pickles_shut()
    with _errors_of_arrow():
        return pq.ParquetFile(source, buffer_size=buffer_size, pre_buffer=pre_buffer)


def read_parquet(source: Any, *, columns: list[str] | None = None) -> pa.Table:
    """As `pq.read_table`, of one file; ArrowInvalid as above."""
    _keep_pickles_shut()
    with _errors_of_arrow():
        return pq.read_table(source, columns=columns)


def parquet_columns(source: Any) -> pa.Schema:
    """The Arrow schema of a Parquet file; ArrowInvalid as above."""
    return open_parquet(source).schema_arrow


def open_arrow(source: Any) -> pa.RecordBatchFileReader:
    """As `pa.ipc.open_file`; ArrowInvalid as above."""
    _keep_pickles_shut()
    with _errors_of_arrow():
        return pa.ipc.open_file(source)


def read_stream(content: bytes | memoryview) -> pa.Table:
    """The table of a stream that is in memory; ArrowInvalid as above."""
    _keep_pickles_shut()
    with _errors_of_arrow(), pa.ipc.open_stream(content) as reader:
        return reader.read_all()


def _keep_pickles_shut() -> None:
    """To be called before anything is opened: whoever imports Ray Data registers its types."""
    tensors: Any = sys.modules.get(_TENSOR_TYPES)
    if tensors is not None:
        tensors._AUTOLOAD_CLOUDPICKLE_TENSOR_METADATA = False
    with suppress(pa.ArrowKeyError):
        # Its values are then the bytes that they are stored as.
        pa.unregister_extension_type(_OBJECT_TYPE)


@contextmanager
def _errors_of_arrow() -> Iterator[None]:
    """What Ray raises of a type that it does not read, as errors of Arrow."""
    try:
        yield
    except pa.ArrowException:
        raise
    except ValueError as error:
        if not str(error).startswith(_REFUSED):
            raise
        raise pa.ArrowInvalid(
            "a column's type is described by a pickle, as Ray 2.49 to 2.54 wrote it, which may be "
            "any code and is never loaded; read and write the file with a newer Ray, where you "
            "trust it"
        ) from error
    except (TypeError, AttributeError) as error:
        raise pa.ArrowInvalid(f"a column's type cannot be read ({error})") from error
