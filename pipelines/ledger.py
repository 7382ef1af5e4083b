"""What is in the catalog against what is in the store: which rows are done, due or dead.

Knows keys and fingerprints only, nothing of images, engines or how files are read.

Both sides are tables of DuckDB, which joins them on all cores and spills to disk beyond its
memory limit. A row is *live* if it is stored and still wanted, *due* if it is wanted and not
stored, *dead* if it is stored and no longer wanted.

Where fingerprints are of content alone, a due row whose content is stored under another key is
*moved*: its embedding is copied. Of due rows with one content that is not stored at all the first
is embedded; the others, its *twins*, wait for it and are copied then. Rejects are not copied: once
a content is stored as a reject only, each row that has it is tried itself. Rows without a
fingerprint (null contents, and rows trusted by key, whose contents nobody read) are neither.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines import schema
from pipelines.counts import TRUSTED, Counts, key_counts, num_by_modality
from pipelines.database import scratch_database, sql_type
from pipelines.schema import (
    FINGERPRINT,
    KEY,
    REASON,
    SOURCE_FILE,
    SOURCE_ROW,
    Modality,
    Reason,
    Stage,
)
from pipelines.settling import settle
from pipelines.snapshots import StoredFile

ROWS_PER_BATCH = 1_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class DueRows:
    """Rows of one catalog file that are to be read."""

    path: str
    """The file."""
    rows: NDArray[np.int64]
    """Ascending row numbers."""
    wanted: dict[Modality, NDArray[np.bool_]]
    """For each row, whether that modality is due."""


class Ledger:
    """The rows of catalog and store, by key. Use as a context; it holds temporary files."""

    def __init__(
        self,
        *,
        key_type: pa.DataType,
        modalities: Sequence[Modality],
        by_content: Collection[Modality] = (),
    ) -> None:
        """Begin with no rows on either side.

        Args:
            key_type: string or int64.
            modalities: Of each key.
            by_content: Those of them where equal fingerprints are equal embeddings.
        """
        self._modalities = tuple(modalities)
        self._by_content = tuple(by_content)
        self._scratch = scratch_database()
        self._db = self._scratch.__enter__()
        key = sql_type(key_type)
        fingerprints = ", ".join(f"{modality} BLOB" for modality in self._modalities)
        self._db.execute(
            f"CREATE TABLE catalog ({SOURCE_FILE} VARCHAR, {SOURCE_ROW} BIGINT, {KEY} {key}, "
            f"{TRUSTED} BOOLEAN, {fingerprints})"
        )
        self._db.execute(
            f"CREATE TABLE stored (path VARCHAR, position BIGINT, modality VARCHAR, {KEY} {key}, "
            f"{FINGERPRINT} BLOB, staged BOOLEAN, retried BOOLEAN, embedded BOOLEAN, "
            f"{REASON} VARCHAR)"
        )

    def __enter__(self) -> Self:
        """Nothing to do; the rows come with the calls."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Drop the tables and their temporary files; ScratchSpaceError if there was no room."""
        self._scratch.__exit__(kind, error, trace)

    def add_catalog_rows(self, rows: pa.Table, *, trusted: bool) -> None:
        """Add rows of the catalog.

        Args:
            rows: `source_file`, `source_row`, `key`, and a fingerprint column for each modality.
            trusted: Their file is the very one that the stored rows were made from, so that the
                key alone tells.
        """
        self._db.execute("DROP TABLE IF EXISTS item")  # made of all rows when they are settled
        rows = rows.append_column(TRUSTED, pa.array(np.full(rows.num_rows, trusted)))
        columns = ", ".join((SOURCE_FILE, SOURCE_ROW, KEY, TRUSTED, *self._modalities))
        self._insert("catalog", rows, columns=columns)

    def add_stored_rows(
        self,
        rows: pa.Table,
        *,
        file: StoredFile,
        retried: NDArray[np.bool_] | None = None,
        staged: bool = False,
    ) -> None:
        """Add all rows of one stored file.

        Args:
            rows: `key` and `fingerprint`; of rejects `reason` too.
            file: Where they lie; files of whole-row rejects do not belong here.
            retried: For each row, whether it is a reject that is due again; None: none is.
            staged: Written for this very catalog and not yet committed: the key alone tells.
        """
        num_rows = rows.num_rows
        table = pa.table(
            {
                "path": pa.repeat(file.path, num_rows),
                "position": np.arange(num_rows),
                "modality": pa.repeat(pa.scalar(file.modality, pa.string()), num_rows),
                KEY: rows[KEY],
                FINGERPRINT: rows[FINGERPRINT],
                "staged": np.full(num_rows, staged),
                "retried": np.zeros(num_rows, dtype=np.bool_) if retried is None else retried,
                "embedded": np.full(num_rows, file.kind == "embeddings"),
                REASON: rows[REASON] if file.kind == "rejects" else pa.nulls(num_rows, pa.string()),
            }
        )
        self._insert("stored", table, columns=", ".join(table.column_names))

    def settle(self) -> None:
        """Join the two sides; the answers below are of the rows added so far."""
        settle(self._db, modalities=self._modalities, by_content=self._by_content)

    def counts(self) -> Counts:
        """The plan in numbers."""
        return Counts(
            num_rows=self._one("SELECT count(*) FROM catalog"),
            num_keys=self._one("SELECT count(*) FROM item WHERE copy = 1"),
            num_due_rows=self._one(
                f"SELECT count(*) FROM (SELECT DISTINCT {SOURCE_FILE}, {SOURCE_ROW} FROM encoded)"
            ),
            keys=key_counts(self._db, modalities=self._modalities),
        )

    def num_due(self) -> dict[Modality, int]:
        """Rows still to be embedded or copied."""
        return num_by_modality(self._db, "FROM due", modalities=self._modalities)

    def num_rejected(self) -> int:
        """Rejects of this very catalog that no snapshot has yet."""
        return self._one("SELECT count(*) FROM live WHERE staged AND NOT embedded")

    def num_waiting(self) -> dict[Modality, int]:
        """Of those due, twins of rows that are still to be embedded."""
        waiting = "FROM copies WHERE path IS NULL"
        return num_by_modality(self._db, waiting, modalities=self._modalities)

    def due(self) -> list[DueRows]:
        """The rows that must be embedded, file by file; neither moved ones nor twins."""
        flags = ", ".join(
            f"bool_or(modality = '{modality}') AS {modality}" for modality in self._modalities
        )
        batches = self._db.sql(
            f"SELECT {SOURCE_FILE}, {SOURCE_ROW}, {flags} FROM encoded "
            f"GROUP BY {SOURCE_FILE}, {SOURCE_ROW} ORDER BY {SOURCE_FILE}, {SOURCE_ROW}"
        ).to_arrow_reader(ROWS_PER_BATCH)
        # Path -> columns, batch by batch: a path for each row would take most of the memory.
        parts: dict[str, list[list[NDArray[Any]]]] = {}
        for batch in batches:
            files = batch.column(SOURCE_FILE).dictionary_encode()
            columns = [
                batch.column(name).to_numpy(zero_copy_only=False)
                for name in (SOURCE_ROW, *self._modalities)
            ]
            bounds = np.searchsorted(files.indices.to_numpy(), np.arange(len(files.dictionary) + 1))
            for path, first, last in zip(
                files.dictionary.to_pylist(), bounds[:-1], bounds[1:], strict=True
            ):
                some = parts.setdefault(path, [])
                some.append([column[first:last].copy() for column in columns])
        due = []
        for path, of_path in parts.items():
            rows, *wanted = (np.concatenate(column) for column in zip(*of_path, strict=True))
            flags_of = dict(zip(self._modalities, wanted, strict=True))
            due.append(DueRows(path=path, rows=rows, wanted=flags_of))
        return due

    def copies(self, *, max_rows: int) -> Iterator[pa.Table]:
        """Due rows whose content is stored: `key`, `modality`, and the `path` and `position` of it.

        Args:
            max_rows: Of one table; all its rows are of one modality, ordered by path and position.
        """
        for modality in self._modalities:
            batches = self._db.sql(
                f"SELECT {KEY}, modality, path, position FROM copies "
                "WHERE path IS NOT NULL AND modality = ? ORDER BY path, position",
                params=[modality],
            ).to_arrow_reader(max_rows)
            for batch in batches:
                for first in range(0, batch.num_rows, max_rows):
                    yield pa.Table.from_batches([batch.slice(first, max_rows)])

    def num_live_by_path(self) -> dict[str, int]:
        """Stored files with live rows -> how many."""
        rows = self._db.sql("SELECT path, count(*) FROM live GROUP BY path").fetchall()
        return {str(path): int(count) for path, count in rows}

    def live_positions(self, paths: Sequence[str]) -> Iterator[NDArray[np.int64]]:
        """Ascending positions of the live rows of each of some stored files.

        Args:
            paths: Different ones; until the last is answered, the ledger is not to be asked for
                anything else.
        """
        num_live = self.num_live_by_path()
        asked = pa.table({"path": pa.array(paths, pa.string()), "place": np.arange(len(paths))})
        self._db.execute("CREATE OR REPLACE TABLE asked (path VARCHAR, place BIGINT)")
        self._insert("asked", asked, columns="path, place")
        # Sorted once: to look for each file by itself would read all rows as often as there are
        # files.
        batches = self._db.sql(
            "SELECT position FROM live JOIN asked USING (path) ORDER BY place, position"
        ).to_arrow_reader(ROWS_PER_BATCH)
        left = np.empty(0, dtype=np.int64)
        for path in paths:
            num = num_live.get(path, 0)
            parts = [left]
            while sum(map(len, parts)) < num:
                parts.append(next(batches)["position"].to_numpy())
            positions = np.concatenate(parts)
            left = positions[num:]
            yield positions[:num]

    def whole_row_rejects(self, *, key_type: pa.DataType) -> pa.Table:
        """Rejects of rows that have no key or a key that an earlier row has, as `rejects_schema`.

        Of several rows with one key the first counts, by file name and row number.
        """
        table = self._db.sql(
            f"""SELECT {KEY}, NULL AS modality, '{Stage.PLAN}' AS stage, * EXCLUDE ({KEY}) FROM (
              SELECT {KEY}, '{Reason.NULL_KEY}' AS reason, NULL AS detail, {SOURCE_FILE},
                {SOURCE_ROW} FROM catalog WHERE {KEY} IS NULL
              UNION ALL
              SELECT i.{KEY}, '{Reason.DUPLICATE_KEY}' AS reason,
                'first in ' || f.{SOURCE_FILE} || ' row ' || f.{SOURCE_ROW} AS detail,
                i.{SOURCE_FILE}, i.{SOURCE_ROW}
              FROM item i JOIN item f ON i.{KEY} = f.{KEY} AND f.copy = 1 WHERE i.copy > 1
            ) ORDER BY {SOURCE_FILE}, {SOURCE_ROW}"""
        ).to_arrow_table()
        table = table.append_column(FINGERPRINT, pa.nulls(table.num_rows, schema.FINGERPRINT_TYPE))
        return table.cast(schema.rejects_schema(key_type=key_type))

    def _insert(self, name: str, rows: pa.Table, *, columns: str) -> None:
        self._db.register("incoming", rows)
        self._db.execute(f"INSERT INTO {name} ({columns}) SELECT {columns} FROM incoming")
        self._db.unregister("incoming")

    def _one(self, query: str) -> int:
        return int(self._db.sql(query).fetchall()[0][0])
