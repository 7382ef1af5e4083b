"""A plan in numbers: what is new, changed, moved, deleted and so on, counted in a ledger.

Knows nothing of how the tables are filled.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipelines.schema import FINGERPRINT, KEY, Modality

if TYPE_CHECKING:  # workers read snapshots, with counts in them, and need no database
    import duckdb

TRUSTED = "trusted"


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyCounts:
    """What a plan makes of the keys of one modality: each of the catalog's is counted once."""

    num_new: int
    """Not in the parent snapshot."""
    num_changed: int
    """There, with another fingerprint."""
    num_retried: int
    """There as a reject of a reason that is tried again."""
    num_moved: int
    """New, changed or retried, but with a content that is stored under another key: copied."""
    num_unchanged: int
    """In the parent snapshot and still right, rejects included."""
    num_staged: int
    """Done by a run that did not finish, rejects included; no snapshot has them yet."""
    num_deleted: int
    """In the parent snapshot, not in the catalog."""
    num_twins: int
    """Of the new, changed and retried: with the content of an earlier one, copied from it."""

    @property
    def num_due(self) -> int:
        """Still to be embedded or copied."""
        return self.num_new + self.num_changed + self.num_retried + self.num_moved

    @property
    def num_encoded(self) -> int:
        """To be embedded; if one is rejected, its twins as well."""
        return self.num_due - self.num_moved - self.num_twins


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """A plan in numbers."""

    num_rows: int
    """Rows of the catalog."""
    num_keys: int
    """Distinct keys that are not null."""
    num_due_rows: int
    """Rows of the catalog to be read: those of copies are not."""
    keys: dict[Modality, KeyCounts]
    """What is to be done for them."""

    @property
    def num_due(self) -> dict[Modality, int]:
        """Still to be embedded or copied."""
        return {modality: keys.num_due for modality, keys in self.keys.items()}

    @property
    def num_planned(self) -> int:
        """To be done, or done by a run that did not finish, of all modalities."""
        return sum(keys.num_due + keys.num_staged for keys in self.keys.values())

    @property
    def num_encoded(self) -> int:
        """To be embedded, of all modalities."""
        return sum(keys.num_encoded for keys in self.keys.values())


def plan_line(keys: KeyCounts) -> str:
    """What is to be done for the keys of one modality, in words."""
    return ", ".join(
        f"{num:,} {what}"
        for what, num in (
            ("new", keys.num_new),
            ("changed", keys.num_changed),
            ("moved", keys.num_moved),
            ("retried", keys.num_retried),
            ("unchanged", keys.num_unchanged),
            ("staged by an unfinished run", keys.num_staged),
            ("deleted", keys.num_deleted),
        )
        if num or what not in ("retried", "staged by an unfinished run")
    )


def key_counts(
    db: "duckdb.DuckDBPyConnection", *, modalities: Sequence[Modality]
) -> dict[Modality, KeyCounts]:
    """Count the keys of a settled ledger.

    Args:
        db: With its tables `stored`, `item`, `live`, `due` and `copies`.
        modalities: Of each key.
    """
    # What the store has of keys that are due is found from their side, which is the shorter.
    due = db.sql(
        f"""WITH known AS (
          SELECT d.{KEY}, d.modality,
            bool_or(s.retried AND NOT s.staged AND {same_content("d")}) AS is_retried,
            bool_or(NOT s.staged) AS is_committed
          FROM stored s JOIN due d ON s.{KEY} = d.{KEY} AND s.modality = d.modality
          GROUP BY d.{KEY}, d.modality
        )
        SELECT d.modality, count(*), count(*) FILTER (c.path IS NOT NULL),
          count(*) FILTER (c.path IS NULL AND is_retried),
          count(*) FILTER (c.path IS NULL AND is_committed AND NOT is_retried),
          count(*) FILTER (c.path IS NULL AND c.{KEY} IS NOT NULL)
        FROM due d LEFT JOIN copies c ON d.{KEY} = c.{KEY} AND d.modality = c.modality
        LEFT JOIN known k ON d.{KEY} = k.{KEY} AND d.modality = k.modality
        GROUP BY d.modality"""
    ).fetchall()
    of_due = {modality: numbers for modality, *numbers in due}
    staged = num_by_modality(db, "FROM live WHERE staged", modalities=modalities)
    unchanged = num_by_modality(db, "FROM live WHERE NOT staged", modalities=modalities)
    deleted = num_by_modality(
        db,
        f"FROM (SELECT DISTINCT s.{KEY}, s.modality FROM stored s ANTI JOIN item i "
        f"ON s.{KEY} = i.{KEY} WHERE NOT s.staged)",
        modalities=modalities,
    )
    counts = {}
    for modality in modalities:
        num_due, num_moved, num_retried, num_changed, num_twins = of_due.get(modality, [0] * 5)
        counts[modality] = KeyCounts(
            num_new=num_due - num_moved - num_retried - num_changed,
            num_changed=num_changed,
            num_retried=num_retried,
            num_moved=num_moved,
            num_unchanged=unchanged[modality],
            num_staged=staged[modality],
            num_deleted=deleted[modality],
            num_twins=num_twins,
        )
    return counts


def num_by_modality(
    db: "duckdb.DuckDBPyConnection", source: str, *, modalities: Sequence[Modality]
) -> dict[Modality, int]:
    """Count the rows of `source`, a FROM clause with a column `modality`."""
    rows = dict(db.sql(f"SELECT modality, count(*) {source} GROUP BY modality").fetchall())
    return {modality: rows.get(modality, 0) for modality in modalities}


def same_content(wanted: str) -> str:
    """SQL: whether a stored row `s` is of the content that a row of the catalog has now."""
    return (
        f"({wanted}.{TRUSTED} OR s.staged "
        f"OR s.{FINGERPRINT} IS NOT DISTINCT FROM {wanted}.{FINGERPRINT})"
    )
