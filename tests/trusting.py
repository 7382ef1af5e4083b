"""Opens files with traps, as pyarrow does and as Clipmill does, and prints what was sprung.

Run by test_arrow_files.py in a process of its own, with Ray Data's variables set that trust files.
"""

import json
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.arrow_files import (
    open_arrow,
    open_parquet,
    parquet_columns,
    read_parquet,
    read_stream,
)
from pipelines.catalog import CatalogConfig, open_catalog
from pipelines.errors import CatalogError
from pipelines.indexes.carried_values import first_value
from pipelines.reading import all_rows, read_rows
from tests.traps import Trap, trapped_type, trapped_value, write_trap


def of_pyarrow(folder: Path) -> dict[str, Callable[[], Any]]:
    """What springs a trap, so that the others are real ones."""
    return {
        "type": lambda: pq.read_table(
            write_trap(folder, trapped_type(Trap(folder))) / "part-0.parquet"
        ),
        "value": lambda: pq.read_table(
            write_trap(folder, trapped_value(Trap(folder))) / "part-0.parquet"
        )["brand"][0].as_py(),
        "arrow value": lambda: (
            pa.ipc.open_file(
                pa.memory_map(str(write_trap(folder, trapped_value(Trap(folder))) / "rows.arrow"))
            )
            .read_all()["brand"][0]
            .as_py()
        ),
    }


def refusal(open_: Callable[[Any], Any], path: Path) -> str:
    try:
        open_(path)
    except (pa.ArrowInvalid, CatalogError) as error:
        return str(error)
    return ""


def carried(folder: Path) -> Any:
    config = CatalogConfig(uri=str(folder), carry_columns=("brand",))
    catalog = open_catalog(config)
    (piece,) = all_rows(catalog, paths=[file.path for file in catalog.files])
    (read,) = read_rows(catalog, piece, ("text",))
    return read["brand"][0].as_py()


def main(folder: Path) -> None:
    sprung = []
    for number, name in enumerate(of_pyarrow(folder)):
        place = folder / f"control-{number}"
        with suppress(Exception):  # what the trap gives is no shape
            of_pyarrow(place)[name]()
        if Trap(place).is_sprung:
            sprung.append(name)
    type_dir, value_dir = folder / "type", folder / "value"
    write_trap(type_dir, trapped_type(Trap(type_dir)))
    write_trap(value_dir, trapped_value(Trap(value_dir)))
    parquet, arrow = type_dir / "part-0.parquet", type_dir / "rows.arrow"
    # A file of Arrow is a stream, behind eight bytes that say so.
    refusals = {
        "parquet": refusal(open_parquet, parquet),
        "table": refusal(read_parquet, parquet),
        "columns": refusal(parquet_columns, parquet),
        "arrow": refusal(lambda path: open_arrow(pa.memory_map(str(path))), arrow),
        "stream": refusal(lambda path: read_stream(path.read_bytes()[8:]), arrow),
        "catalog": refusal(lambda path: open_catalog(CatalogConfig(uri=str(path))), type_dir),
    }
    with open_arrow(pa.memory_map(str(value_dir / "rows.arrow"))) as reader:
        values = [first_value(reader.read_all()["brand"].combine_chunks())]
    values += [read_parquet(value_dir / "part-0.parquet")["brand"][0].as_py(), carried(value_dir)]
    found = {
        "controls": sprung,
        "sprung": [place.name for place in (type_dir, value_dir) if Trap(place).is_sprung],
        "refusals": refusals,
        "values": [type(value).__name__ for value in values],
    }
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
