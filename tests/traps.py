"""What makes a file as it is unpickled, alone or within files of Arrow."""

import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


class Trap:
    """Makes a file as it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.mark = folder / "sprung"

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.mark), "w"))

    @property
    def is_sprung(self) -> bool:
        return self.mark.exists()


def trapped_type(trap: Trap) -> pa.Table:
    """Whose column `vector` is a tensor of Ray Data, its shape a trap."""
    metadata = {
        "ARROW:extension:name": "ray.data.arrow_tensor_v2",
        "ARROW:extension:metadata": pickle.dumps(trap),
    }
    vector = pa.field("vector", pa.large_list(pa.int64()), metadata=metadata)
    columns = pa.schema([("key", pa.string()), ("text", pa.string()), vector])
    return pa.table({"key": ["a"], "text": ["red"], "vector": [[1, 2]]}, schema=columns)


def trapped_value(trap: Trap) -> pa.Table:
    """Whose column `brand` is a Python object of Ray Data, its value a trap."""
    metadata = {
        "ARROW:extension:name": "ray.data.arrow_pickled_object",
        "ARROW:extension:metadata": b"",
    }
    brand = pa.field("brand", pa.large_binary(), metadata=metadata)
    columns = pa.schema([("key", pa.string()), ("text", pa.string()), brand])
    return pa.table({"key": ["a"], "text": ["red"], "brand": [pickle.dumps(trap)]}, schema=columns)


def write_trap(folder: Path, table: pa.Table) -> Path:
    """The table as a catalog of one file, and as `rows.arrow` beside it."""
    folder.mkdir(parents=True)
    pq.write_table(table, folder / "part-0.parquet")
    with pa.ipc.new_file(str(folder / "rows.arrow"), table.schema) as writer:
        writer.write_table(table)
    return folder
