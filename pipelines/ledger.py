"""What is in the catalog against what is in the store: which rows are done, due or dead.

Knows keys and fingerprints only, nothing of images, engines or how files are read.

Both sides are tables of DuckDB, which joins them on all cores and spills to disk beyond its
memory limit. A row is *live* if it is stored and still wanted, *due* if it is wanted and not
stored, *dead* if it is stored and no longer wanted.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines import schema
from pipelines.database import open_database, sql_type
from pipelines.schema import FINGERPRINT, KEY, SOURCE_FILE, SOURCE_ROW, Modality, Reason, Stage
from pipelines.snapshots import StoredFile

TRUSTED = "trusted"


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """A plan in numbers."""

    num_rows: int
    """Rows of the catalog."""
    num_keys: int
    """Distinct keys that are not null."""
    num_due: dict[Modality, int]
    """Still to be embedded."""
    num_due_rows: int
    """Rows of the catalog to be read for them."""
    num_live: dict[Modality, int]
    """Stored and still right, rejects included."""


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

    def __init__(self, *, key_type: pa.DataType, modalities: Sequence[Modality]) -> None:
        """Begin with no rows on either side."""
        self._modalities = tuple(modalities)
        self._spill_dir = tempfile.TemporaryDirectory(prefix="clipmill-ledger-")
        self._db = open_database(self._spill_dir.name)
        key = sql_type(key_type)
        fingerprints = ", ".join(f"{modality} BLOB" for modality in self._modalities)
        self._db.execute(
            f"CREATE TABLE catalog ({SOURCE_FILE} VARCHAR, {SOURCE_ROW} BIGINT, {KEY} {key}, "
            f"{TRUSTED} BOOLEAN, {fingerprints})"
        )
        self._db.execute(
            f"CREATE TABLE stored (path VARCHAR, position BIGINT, modality VARCHAR, {KEY} {key}, "
            f"{FINGERPRINT} BLOB, staged BOOLEAN)"
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
        """Drop the tables and their temporary files."""
        self._db.close()
        self._spill_dir.cleanup()

    def add_catalog_rows(self, rows: pa.Table, *, trusted: bool) -> None:
        """Add rows of the catalog.

        Args:
            rows: `source_file`, `source_row`, `key`, and a fingerprint column for each modality.
            trusted: Their file is the very one that the stored rows were made from, so that the
                key alone tells.
        """
        rows = rows.append_column(TRUSTED, pa.array(np.full(rows.num_rows, trusted)))
        columns = ", ".join((SOURCE_FILE, SOURCE_ROW, KEY, TRUSTED, *self._modalities))
        self._insert("catalog", rows, columns=columns)

    def add_stored_rows(
        self,
        rows: pa.Table,
        *,
        file: StoredFile,
        positions: NDArray[np.int64] | None = None,
        staged: bool = False,
    ) -> None:
        """Add rows of one stored file; those that are left out count as dead.

        Args:
            rows: `key` and `fingerprint`.
            positions: Where in the file they are, ascending; None: they are all of it.
            file: Where they lie; files of whole-row rejects do not belong here.
            staged: Written for this very catalog and not yet committed: the key alone tells.
        """
        num_rows = rows.num_rows
        table = pa.table(
            {
                "path": pa.repeat(file.path, num_rows),
                "position": np.arange(num_rows) if positions is None else positions,
                "modality": pa.repeat(pa.scalar(file.modality, pa.string()), num_rows),
                KEY: rows[KEY],
                FINGERPRINT: rows[FINGERPRINT],
                "staged": np.full(num_rows, staged),
            }
        )
        self._insert("stored", table, columns=", ".join(table.column_names))

    def settle(self) -> None:
        """Join the two sides; the answers below are of the rows added so far."""
        self._db.execute(
            f"CREATE OR REPLACE TABLE item AS SELECT *, row_number() OVER "
            f"(PARTITION BY {KEY} ORDER BY {SOURCE_FILE}, {SOURCE_ROW}) AS copy "
            f"FROM catalog WHERE {KEY} IS NOT NULL"
        )
        wanted = " UNION ALL ".join(
            f"SELECT {KEY}, {SOURCE_FILE}, {SOURCE_ROW}, {TRUSTED}, '{modality}' AS modality, "
            f"{modality} AS {FINGERPRINT} FROM item WHERE copy = 1"
            for modality in self._modalities
        )
        self._db.execute(f"CREATE OR REPLACE VIEW wanted AS {wanted}")
        # Of two stored copies (a task that was run twice) the committed one is kept.
        self._db.execute(
            f"""CREATE OR REPLACE TABLE live AS
            SELECT path, position, {KEY}, modality FROM (
              SELECT s.path, s.position, s.{KEY}, s.modality, row_number() OVER
                (PARTITION BY s.{KEY}, s.modality ORDER BY s.staged, s.path, s.position) AS copy
              FROM stored s JOIN wanted w ON s.{KEY} = w.{KEY} AND s.modality = w.modality
                AND (w.{TRUSTED} OR s.staged
                  OR s.{FINGERPRINT} IS NOT DISTINCT FROM w.{FINGERPRINT})
            ) WHERE copy = 1"""
        )
        self._db.execute(
            f"""CREATE OR REPLACE TABLE due AS
            SELECT {SOURCE_FILE}, {SOURCE_ROW}, modality FROM wanted w ANTI JOIN live l
            ON w.{KEY} = l.{KEY} AND w.modality = l.modality"""
        )

    def counts(self) -> Counts:
        """The plan in numbers."""
        return Counts(
            num_rows=self._one("SELECT count(*) FROM catalog"),
            num_keys=self._one("SELECT count(*) FROM item WHERE copy = 1"),
            num_due=self._by_modality("due"),
            num_due_rows=self._one(
                f"SELECT count(*) FROM (SELECT DISTINCT {SOURCE_FILE}, {SOURCE_ROW} FROM due)"
            ),
            num_live=self._by_modality("live"),
        )

    def due(self) -> list[DueRows]:
        """The rows that must be embedded, file by file."""
        flags = ", ".join(
            f"bool_or(modality = '{modality}') AS {modality}" for modality in self._modalities
        )
        table = self._db.sql(
            f"SELECT {SOURCE_FILE}, {SOURCE_ROW}, {flags} FROM due "
            f"GROUP BY {SOURCE_FILE}, {SOURCE_ROW} ORDER BY {SOURCE_FILE}, {SOURCE_ROW}"
        ).to_arrow_table()
        files = table[SOURCE_FILE].dictionary_encode().combine_chunks()
        codes = files.indices.to_numpy()
        rows = table[SOURCE_ROW].to_numpy()
        wanted = {modality: table[modality].to_numpy() for modality in self._modalities}
        bounds = np.searchsorted(codes, np.arange(len(files.dictionary) + 1))
        return [
            DueRows(
                path=path,
                rows=rows[first:last],
                wanted={modality: flags[first:last] for modality, flags in wanted.items()},
            )
            for path, first, last in zip(
                files.dictionary.to_pylist(), bounds[:-1], bounds[1:], strict=True
            )
        ]

    def num_live_by_path(self) -> dict[str, int]:
        """Stored files with live rows -> how many."""
        rows = self._db.sql("SELECT path, count(*) FROM live GROUP BY path").fetchall()
        return {str(path): int(count) for path, count in rows}

    def live_positions(self, path: str) -> NDArray[np.int64]:
        """Ascending positions of a stored file's live rows."""
        found = self._db.sql(
            "SELECT position FROM live WHERE path = ? ORDER BY position", params=[path]
        ).fetchnumpy()
        return np.asarray(found["position"], dtype=np.int64)

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

    def _by_modality(self, table: str) -> dict[Modality, int]:
        return {
            modality: self._one(f"SELECT count(*) FROM {table} WHERE modality = '{modality}'")
            for modality in self._modalities
        }
