"""DuckDB for what does not fit in memory: where it spills to, and how keys are typed there.

Knows nothing of what is kept in it.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import duckdb
import pyarrow as pa

from pipelines.errors import ScratchSpaceError

MEMORY_LIMIT_BYTES = 2 * 2**30


@contextmanager
def scratch_database() -> Iterator[duckdb.DuckDBPyConnection]:
    """An empty database for the length of a block.

    It is in memory, and goes on in a temporary folder beyond its limit.

    Raises:
        ScratchSpaceError: There is no room for that.
    """
    try:
        folder = tempfile.TemporaryDirectory(prefix="clipmill-")
    except OSError as error:
        raise _no_room(tempfile.gettempdir(), error) from error
    with folder as spill_dir:
        config: dict[str, str | bool | int | float | list[str]] = {
            "memory_limit": f"{MEMORY_LIMIT_BYTES // 2**20}MiB",
            "temp_directory": spill_dir,
            "preserve_insertion_order": False,
        }
        try:
            with duckdb.connect(config=config) as db:
                yield db
        except (duckdb.OutOfMemoryException, duckdb.IOException) as error:
            raise _no_room(spill_dir, error) from error


def sql_type(key_type: pa.DataType | str) -> str:
    """Of keys: string or int64."""
    return "BIGINT" if str(key_type) == str(pa.int64()) else "VARCHAR"


def _no_room(folder: str, error: Exception) -> ScratchSpaceError:
    reason = str(error).splitlines()[0]
    return ScratchSpaceError(
        f"{folder}: no room for what does not fit in memory ({reason}); free space there, or name "
        "a folder of a larger disk in $TMPDIR: a plan takes some 450 bytes for each key. Nothing "
        "was committed"
    )
