"""Ledgers of rows made by hand, and their answers in plain Python."""

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines import schema
from pipelines.ledger import Ledger
from pipelines.schema import Modality
from pipelines.snapshots import Kind, StoredFile
from tests.stored import fingerprint

Key = str | int | None


@dataclass(frozen=True)
class Row:
    """One row of the catalog; contents None are null."""

    file: str
    row: int
    key: Key
    image: str | None = None
    text: str | None = None


@dataclass(frozen=True)
class Stored:
    """One stored file with (key, content) of each row."""

    path: str
    modality: Modality
    rows: Sequence[tuple[Key, str | None]]
    staged: bool = False
    kind: Kind = "embeddings"
    retried: Sequence[Key] = ()
    reason: str = "not_an_image"
    """Of rejects."""


def as_blob(content: str | None) -> bytes | None:
    return None if content is None else fingerprint(content)


def settled(
    rows: Iterable[Row],
    stored: Iterable[Stored] = (),
    *,
    trusted: Iterable[str] = (),
    modalities: Sequence[Modality] = ("image",),
    key_type: pa.DataType | None = None,
    by_content: Sequence[Modality] = (),
) -> Ledger:
    """A ledger of these rows; files named in `trusted` are added as such."""
    key_type = key_type or pa.string()
    ledger = Ledger(key_type=key_type, modalities=modalities, by_content=by_content)
    by_file = defaultdict(list)
    for row in rows:
        by_file[row.file].append(row)
    for file, of_file in by_file.items():
        columns: dict[str, Any] = {
            schema.SOURCE_FILE: [file] * len(of_file),
            schema.SOURCE_ROW: pa.array([row.row for row in of_file], pa.int64()),
            schema.KEY: pa.array([row.key for row in of_file], key_type),
        }
        for modality in modalities:
            contents = [as_blob(getattr(row, modality)) for row in of_file]
            columns[modality] = pa.array(contents, schema.FINGERPRINT_TYPE)
        ledger.add_catalog_rows(pa.table(columns), trusted=file in set(trusted))
    for file in stored:
        table = pa.table(
            {
                schema.KEY: pa.array([key for key, _ in file.rows], key_type),
                schema.FINGERPRINT: pa.array(
                    [as_blob(content) for _, content in file.rows], schema.FINGERPRINT_TYPE
                ),
            }
        )
        if file.kind == "rejects":
            table = table.append_column(schema.REASON, pa.repeat(file.reason, len(file.rows)))
        retried = np.array([key in file.retried for key, _ in file.rows], dtype=np.bool_)
        ledger.add_stored_rows(table, file=stored_file(file), staged=file.staged, retried=retried)
    ledger.settle()
    return ledger


def stored_file(file: Stored) -> StoredFile:
    return StoredFile(
        path=file.path,
        kind=file.kind,
        modality=file.modality,
        num_rows=len(file.rows),
        num_bytes=1,
    )


def due(ledger: Ledger) -> dict[tuple[str, int], set[str]]:
    """(file, row) -> what is due of it."""
    found = {}
    for file in ledger.due():
        assert file.rows.tolist() == sorted(file.rows.tolist())
        for index, row in enumerate(file.rows.tolist()):
            found[file.path, row] = {
                name for name, flags in file.wanted.items() if flags[index].item()
            }
    return found


def live(ledger: Ledger, stored: Iterable[Stored]) -> dict[str, list[int]]:
    """Path -> positions of live rows; paths without any are left out."""
    paths = [file.path for file in stored]
    found = dict(zip(paths, ledger.live_positions(paths), strict=True))
    positions = {path: rows.tolist() for path, rows in found.items()}
    positions = {path: rows for path, rows in positions.items() if rows}
    assert ledger.num_live_by_path() == {path: len(rows) for path, rows in positions.items()}
    return positions


def copies(ledger: Ledger, *, max_rows: int = 1000) -> dict[tuple[Key, str], tuple[str, int]]:
    """(key, modality) -> path and position of the embedding to be copied."""
    found = {}
    for table in ledger.copies(max_rows=max_rows):
        assert 0 < table.num_rows <= max_rows
        assert len(set(table["modality"].to_pylist())) == 1
        for row in table.to_pylist():
            assert (row["key"], row["modality"]) not in found
            found[row["key"], row["modality"]] = (row["path"], row["position"])
    return found


def counted(ledger: Ledger, modality: Modality = "image") -> dict[str, int]:
    """What is not 0 of the counts of a modality, without `num_`."""
    counts = dataclasses.asdict(ledger.counts().keys[modality])
    return {name.removeprefix("num_"): num for name, num in counts.items() if num}


def rejects(ledger: Ledger, key_type: pa.DataType | None = None) -> list[tuple[Any, ...]]:
    key_type = key_type or pa.string()
    table = ledger.whole_row_rejects(key_type=key_type)
    assert table.schema == schema.rejects_schema(key_type=key_type)
    assert set(table["stage"].to_pylist()) <= {"plan"}
    assert table["modality"].null_count == table["fingerprint"].null_count == table.num_rows
    columns = ("key", "reason", "detail", "source_file", "source_row")
    return list(zip(*(table[name].to_pylist() for name in columns), strict=True))
