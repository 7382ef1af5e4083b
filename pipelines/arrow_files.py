"""Opens Parquet and Arrow files that others may have written: none of them brings code along.

Knows nothing of what they hold.

A file may say that a column is of one of Ray Data's types. Ray then unpickles their description, if
$RAY_DATA_AUTOLOAD_CLOUDPICKLE_TENSOR_METADATA says that all files are trusted, and unpickles values
of its type for Python objects in any case. Here neither happens, in the whole process from the
first file on: no column of ours is of these types.
"""

import sys
from contextlib import suppress
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

_TENSOR_TYPES = "ray.data._internal.tensor_extensions.arrow"
_OBJECT_TYPE = "ray.data.arrow_pickled_object"


def open_parquet(source: Any, *, buffer_size: int = 0, pre_buffer: bool = True) -> pq.ParquetFile:
    """As `pq.ParquetFile`; ArrowInvalid for a type that only a pickle describes."""
    _keep_pickles_shut()
    try:
        return pq.ParquetFile(source, buffer_size=buffer_size, pre_buffer=pre_buffer)
    except ValueError as error:
        raise _of_arrow(error) from error


def read_parquet(source: Any, *, columns: list[str] | None = None) -> pa.Table:
    """As `pq.read_table`, of one file; ArrowInvalid as above."""
    _keep_pickles_shut()
    try:
        return pq.read_table(source, columns=columns)
    except ValueError as error:
        raise _of_arrow(error) from error


def parquet_columns(source: Any) -> pa.Schema:
    """The Arrow schema of a Parquet file; ArrowInvalid as above."""
    return open_parquet(source).schema_arrow


def open_arrow(source: Any) -> pa.RecordBatchFileReader:
    """As `pa.ipc.open_file`; ArrowInvalid as above."""
    _keep_pickles_shut()
    try:
        return pa.ipc.open_file(source)
    except ValueError as error:
        raise _of_arrow(error) from error


def _keep_pickles_shut() -> None:
    """Before each file: whoever imports Ray Data registers its types."""
    tensors: Any = sys.modules.get(_TENSOR_TYPES)
    if tensors is not None:
        tensors._AUTOLOAD_CLOUDPICKLE_TENSOR_METADATA = False
    with suppress(pa.ArrowKeyError):
        # Its values are then the bytes that they are stored as.
        pa.unregister_extension_type(_OBJECT_TYPE)


def _of_arrow(error: ValueError) -> Any:
    """Arrow's own errors as they are; one of a type that Ray could not read, as one of Arrow's."""
    if isinstance(error, pa.ArrowException):
        return error
    return pa.ArrowInvalid(
        "a column's type is described by a pickle, as Ray 2.49 to 2.54 wrote it, which may be any "
        "code and is never loaded; read and write the file with a newer Ray, where you trust it"
    )
