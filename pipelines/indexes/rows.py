"""Keys and carried columns by id, and ids by key: a table on the disk, memory-mapped.

Knows nothing of vectors, nor of why rows come and go. Nothing is read until it is asked for.

    rows.arrow    Arrow IPC file of batches of BATCH_ROWS rows, but the last: row i belongs to id
                  i. `key` (string or int64; null: the id is free), then the carried columns
    hashes.npy    see `pipelines.indexes.key_hashes`
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines import schema
from pipelines.arrow_files import open_arrow
from pipelines.errors import StoreError
from pipelines.indexes.carried_values import check_values, first_value
from pipelines.indexes.key_hashes import (
    HASHES_FILE,
    Ids,
    KeyHashes,
    hash_keys,
    key_content,
)

ROWS_FILE = "rows.arrow"
# A batch is what a change rewrites and a filter reads at once.
BATCH_ROWS = 65_536
KEY_TYPES = (pa.string(), pa.int64())


class RowTable:
    """The rows of an index."""

    def __init__(self, folder: Path) -> None:
        """Map the files of a folder; StoreError if one is missing, cut, or no such file."""
        self.path = folder / ROWS_FILE
        try:
            self._reader = open_arrow(pa.memory_map(str(self.path)))
            self.schema: pa.Schema = self._reader.schema
            names = self.schema.names
        except (OSError, ValueError, pa.ArrowException) as error:
            raise self._damaged(error) from error
        if names[:1] != [schema.KEY] or self.schema.field(0).type not in KEY_TYPES:
            raise self._damaged(f"columns {names}")
        self.key_type: pa.DataType = self.schema.field(0).type
        self._hashes = KeyHashes(folder / HASHES_FILE)
        self.num_rows = len(self._hashes)
        """Ids that are not free."""
        self.num_batches: int = self._reader.num_record_batches
        self._batches: dict[int, _Batch] = {}
        self.num_ids = 0
        """Ids are 0 to this, without it."""
        if self.num_batches:
            self.num_ids = (self.num_batches - 1) * BATCH_ROWS
            self.num_ids += self._batch(self.num_batches - 1).num_rows
        if self.num_rows > self.num_ids:
            raise self._damaged(f"{self.num_ids} rows, and {HASHES_FILE} has {self.num_rows}")

    def id_of(self, key: str | int) -> int | None:
        """The id of a key; None if it is not there, or is none of `key_type`."""
        content = key_content(key, key_type=self.key_type)
        if content is None:
            return None
        for row_id in self._hashes.candidates(content):
            if self._content(row_id) == content:
                return row_id
        return None

    def key_of(self, row_id: int) -> str | int | None:
        """The key of an id; None if it is free. StoreError if there is no such id."""
        content = self._content(row_id)
        if content is None:
            return None
        if self.key_type == pa.int64():
            return int.from_bytes(content, "little", signed=True)
        try:
            return content.decode()
        except UnicodeDecodeError as error:
            raise self._damaged(error) from error

    def ids_of(self, keys: pa.Array) -> Ids:
        """Ids int64 [N] of keys [N] of `key_type`; -1 for those that are not there."""
        if isinstance(keys, pa.ChunkedArray):
            keys = keys.combine_chunks()
        ids = np.full(len(keys), -1, dtype=np.int64)
        place, end = self._hashes.spans(hash_keys(keys))
        asked = np.flatnonzero(place < end)
        while len(asked):  # once, and once more for each key more of the same hash
            found = self._hashes.ids[place[asked]]
            equal = pc.equal(self.keys_of(found), keys.take(pa.array(asked)))
            same = equal.fill_null(False).to_numpy(zero_copy_only=False)
            ids[asked[same]] = found[same]
            place[asked] += 1
            asked = asked[~same]
            asked = asked[place[asked] < end[asked]]
        return ids

    def keys_of(self, ids: Ids) -> pa.Array:
        """Keys [N] of ids int64 [N]; null for free ones. StoreError if there is no such id."""
        order = np.argsort(ids, kind="stable")
        numbers, starts = np.unique(ids[order] // BATCH_ROWS, return_index=True)
        parts = [
            self._batch(int(number)).keys_at(rows % BATCH_ROWS)
            for number, rows in zip(numbers, np.split(ids[order], starts[1:]), strict=False)
        ]
        back = np.empty(len(ids), dtype=np.int64)
        back[order] = np.arange(len(ids))
        return pa.concat_arrays([pa.array([], self.key_type), *parts]).take(pa.array(back))

    def columns_of(self, ids: Sequence[int] | Ids) -> list[dict[str, Any]]:
        """The carried columns of each id, as Python values; StoreError if there is no such id."""
        found = []
        for row_id in map(int, ids):
            number, row = divmod(row_id, BATCH_ROWS)
            found.append(self._batch(number).carried_at(row))
        return found

    def alive(self) -> NDArray[np.uint8]:
        """A bitmap over ids, of those that are not free: bit i & 7 of byte i >> 3."""
        parts = [
            packed(self.column(schema.KEY, number).is_valid()) for number in range(self.num_batches)
        ]
        return np.concatenate([np.zeros(0, dtype=np.uint8), *parts])

    def column(self, name: str, number: int) -> pa.Array:
        """One column of one batch, checked in full; StoreError if it is damaged."""
        column = self.batch(number).column(self.schema.get_field_index(name))
        try:
            check_values(column)
        except pa.ArrowException as error:
            raise self._damaged(error) from error
        return column

    def batch(self, number: int) -> pa.RecordBatch:
        """One batch, of which nothing is read yet; StoreError if it is damaged."""
        return self._batch(number).batch

    def hashes(self) -> KeyHashes:
        """Of all keys, with their ids."""
        return self._hashes

    def _content(self, row_id: int) -> bytes | None:
        number, row = divmod(row_id, BATCH_ROWS)
        return (self._batches.get(number) or self._batch(number)).content_at(row)

    def _batch(self, number: int) -> "_Batch":
        known = self._batches.get(number)
        if known is not None:
            return known
        if not 0 <= number < self.num_batches:
            raise self._damaged(f"an id of batch {number} of {self.num_batches}")
        try:
            batch = self._reader.get_batch(number)
            batch.validate()
        except (OSError, ValueError, pa.ArrowException) as error:
            raise self._damaged(error) from error
        is_last = number == self.num_batches - 1
        if batch.num_rows > BATCH_ROWS or (batch.num_rows < BATCH_ROWS and not is_last):
            raise self._damaged(f"batch {number} has {batch.num_rows} rows")
        return self._batches.setdefault(number, _Batch(batch, path=self.path))

    def _damaged(self, why: object) -> StoreError:
        return damaged(self.path, why)


class _Batch:
    """One batch, with its keys by their buffers: an Arrow scalar takes microseconds."""

    def __init__(self, batch: pa.RecordBatch, *, path: Path) -> None:
        self.batch, self.num_rows, self._path = batch, batch.num_rows, path
        self._keys = batch.column(0)
        self._carried = batch.select(batch.schema.names[1:])
        validity, *values = self._keys.buffers()
        self._validity = None if validity is None else memoryview(validity)
        self._offsets: memoryview | None = None
        if self._keys.type == pa.string():
            self._offsets = memoryview(values.pop(0))[: 4 * (self.num_rows + 1)].cast("i")
        self._values = memoryview(values[0] or b"").cast("B")

    def content_at(self, row: int) -> bytes | None:
        """The bytes of a key, None if there is none."""
        if row >= self.num_rows:
            raise damaged(self._path, f"row {row} of {self.num_rows} was asked for")
        if self._validity is not None and not self._validity[row >> 3] >> (row & 7) & 1:
            return None
        if self._offsets is None:
            return bytes(self._values[8 * row : 8 * row + 8])
        start, end = self._offsets[row], self._offsets[row + 1]
        if not 0 <= start <= end <= len(self._values):
            raise damaged(self._path, f"a key from byte {start} to {end}")
        return bytes(self._values[start:end])

    def keys_at(self, rows: Ids) -> pa.Array:
        """Keys [N] of some rows."""
        if rows.max(initial=0) >= self.num_rows:
            raise damaged(self._path, f"row {rows.max()} of {self.num_rows} was asked for")
        if self._offsets is not None:
            offsets = np.frombuffer(self._offsets, dtype=np.int32)
            starts, ends = offsets[rows], offsets[rows + 1]
            if not ((starts >= 0) & (starts <= ends) & (ends <= len(self._values))).all():
                raise damaged(self._path, "a key lies outside of the file")
        keys = self._keys.take(pa.array(rows))
        try:
            keys.validate(full=True)
        except pa.ArrowException as error:
            raise damaged(self._path, error) from error
        return keys

    def carried_at(self, row: int) -> dict[str, Any]:
        """The carried columns of a row."""
        if row >= self.num_rows:
            raise damaged(self._path, f"row {row} of {self.num_rows} was asked for")
        one = self._carried.slice(row, 1)
        try:
            for column in one.columns:
                check_values(column)
        except pa.ArrowException as error:
            raise damaged(self._path, error) from error
        return {
            name: first_value(column)
            for name, column in zip(one.schema.names, one.columns, strict=True)
        }


def packed(flags: pa.Array) -> NDArray[np.uint8]:
    """Booleans without nulls -> a bitmap, least significant bit first."""
    return np.packbits(flags.to_numpy(zero_copy_only=False), bitorder="little")


def damaged(path: Path, why: object) -> StoreError:
    """What to raise for a file that is not what was written."""
    reason = (str(why).splitlines() or [""])[0]
    return StoreError(
        f"{path} is damaged or missing ({reason}); remove the index it belongs to and run "
        "`clipmill index` again"
    )
