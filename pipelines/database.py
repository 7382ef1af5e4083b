"""DuckDB for what does not fit in memory: where it spills to, and how keys are typed there.

Knows nothing of what is kept in it.
"""

import duckdb
import pyarrow as pa

MEMORY_LIMIT_BYTES = 2 * 2**30


def open_database(spill_dir: str) -> duckdb.DuckDBPyConnection:
    """An empty database in memory, which goes on in a folder beyond its limit."""
    return duckdb.connect(
        config={
            "memory_limit": f"{MEMORY_LIMIT_BYTES // 2**20}MiB",
            "temp_directory": spill_dir,
            "preserve_insertion_order": False,
        }
    )


def sql_type(key_type: pa.DataType | str) -> str:
    """Of keys: string or int64."""
    return "BIGINT" if str(key_type) == str(pa.int64()) else "VARCHAR"
