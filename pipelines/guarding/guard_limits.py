"""How far a snapshot may be from the one before it: the bounds of all guards.

Knows nothing of how anything is measured.
"""

from dataclasses import dataclass, fields


@dataclass(frozen=True, kw_only=True, slots=True)
class GuardLimits:
    """How far a snapshot may be from the one before it."""

    max_rejects: float = 0.1
    """Share of the keys that are rejects, of a modality; as `RowLimits.max_reject_share`."""
    max_deletions: float = 0.2
    """Share of the keys before that are gone: catalogs lose few in a night, half-delivered ones
    many."""
    max_norms: float = 0.0
    """Share of new embeddings whose norm is not 1: the towers' last step is that norm."""
    min_drift: float = 0.9
    """Cosine of the mean embedding to that before, by the same engine. Of the same rows but some it
    is nearly 1; black images, or one language in place of another, move the mean of all."""
    min_new_drift: float = 0.3
    """Cosine of the mean of the new embeddings to the mean before, by the same engine. They may
    honestly be of another category: those of the demo's images have 0.5 and more. Noise has 0."""
    max_collapse: float = 0.98
    """Length of the mean of the new embeddings, 1 if they are all the same, unless that before is
    as long, by the same engine. Their mean cosine to each other is its square; catalogs have
    lengths of 0.2 to 0.9."""
    min_neighbours: float = 0.5
    """Of ten neighbours, after a change of engine: builds of one checkpoint keep 0.9 and more (the
    gate of engines asks 0.93); who loses half sees the catalog otherwise, and means to."""
    min_recall: float = 0.95
    """recall@10 of the index; of an exact one it is 1."""

    def __post_init__(self) -> None:
        """Check the bounds."""
        for field in fields(self):
            value = getattr(self, field.name)
            lowest = -1 if field.name in ("min_drift", "min_new_drift") else 0
            if not lowest <= value <= 1:
                raise ValueError(f"{field.name}={value}: expected {lowest} to 1")
