"""Joins the two sides of a ledger: which rows are live, due or moved, and which wait for a twin.

Knows nothing of how they came there, or of who asks (`pipelines.ledger` says what the words mean).
"""

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from pipelines.counts import TRUSTED, same_content
from pipelines.schema import FINGERPRINT, KEY, REASON, SOURCE_FILE, SOURCE_ROW, Modality

if TYPE_CHECKING:
    import duckdb


def settle(
    db: "duckdb.DuckDBPyConnection",
    *,
    modalities: Sequence[Modality],
    by_content: Collection[Modality],
) -> None:
    """Join the tables `catalog` and `stored` of a ledger into those that it answers from.

    Args:
        db: Where they are.
        modalities: Of each key.
        by_content: Those of them where equal fingerprints are equal embeddings.
    """
    of_content = " OR ".join(f"modality = '{name}'" for name in by_content) or "false"
    db.execute(
        f"CREATE TABLE IF NOT EXISTS item AS SELECT *, row_number() OVER "
        f"(PARTITION BY {KEY} ORDER BY {SOURCE_FILE}, {SOURCE_ROW}) AS copy "
        f"FROM catalog WHERE {KEY} IS NOT NULL"
    )
    wanted = " UNION ALL ".join(
        f"SELECT {KEY}, {SOURCE_FILE}, {SOURCE_ROW}, {TRUSTED}, '{modality}' AS modality, "
        f"{modality} AS {FINGERPRINT} FROM item WHERE copy = 1"
        for modality in modalities
    )
    db.execute(f"CREATE OR REPLACE VIEW wanted AS {wanted}")
    # Tried again, and rejected for the same reason: then the reject that was there stays.
    db.execute(
        f"""UPDATE stored SET retried = false WHERE retried AND EXISTS (
          FROM stored s WHERE s.{KEY} = stored.{KEY} AND s.modality = stored.modality
            AND s.{REASON} = stored.{REASON} AND s.staged AND NOT s.retried
        )"""
    )
    # Of two stored copies (a task that was run twice) the committed one is kept, but an
    # embedding rather than a reject: that was tried again, by a run that did not finish.
    db.execute(
        f"""CREATE OR REPLACE TABLE live AS
        SELECT path, position, {KEY}, modality, staged, embedded FROM (
          SELECT s.path, s.position, s.{KEY}, s.modality, s.staged, s.embedded,
            row_number() OVER (PARTITION BY s.{KEY}, s.modality
              ORDER BY NOT s.embedded, s.staged, s.path, s.position) AS copy
          FROM stored s JOIN wanted w ON s.{KEY} = w.{KEY} AND s.modality = w.modality
            AND NOT s.retried AND {same_content("w")}
        ) WHERE copy = 1"""
    )
    db.execute(
        f"""CREATE OR REPLACE TABLE due AS
        SELECT w.* FROM wanted w ANTI JOIN live l
        ON w.{KEY} = l.{KEY} AND w.modality = l.modality"""
    )
    # Without a path: it waits for the first row of its content, of which nothing is stored.
    db.execute(
        f"""CREATE OR REPLACE TABLE copies AS
        WITH content AS (
          SELECT modality, {FINGERPRINT}, arg_min({{'path': path, 'position': position}},
            (staged, path, position)) FILTER (embedded) AS source
          FROM stored s SEMI JOIN due d
            ON s.{FINGERPRINT} = d.{FINGERPRINT} AND s.modality = d.modality
          WHERE NOT retried AND ({of_content}) GROUP BY modality, {FINGERPRINT}
        )
        SELECT {KEY}, modality, source.path AS path, source.position AS position FROM (
          SELECT d.{KEY}, d.modality, c.source, c.modality IS NOT NULL AS is_stored,
            row_number() OVER (PARTITION BY d.modality, d.{FINGERPRINT}
              ORDER BY d.{SOURCE_FILE}, d.{SOURCE_ROW}) AS copy
          FROM (FROM due WHERE {FINGERPRINT} IS NOT NULL AND ({of_content})) d
          LEFT JOIN content c ON c.{FINGERPRINT} = d.{FINGERPRINT} AND c.modality = d.modality
        ) WHERE source IS NOT NULL OR (copy > 1 AND NOT is_stored)"""
    )
    db.execute(
        f"""CREATE OR REPLACE VIEW encoded AS SELECT d.* FROM due d ANTI JOIN copies c
        ON d.{KEY} = c.{KEY} AND d.modality = c.modality"""
    )
