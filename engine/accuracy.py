"""How close embeddings are to those of a reference: cosines, neighbours, pairs, classes.

Knows nothing of what made either.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

NEIGHBOURS = 10
RECALL_CUTOFFS = (1, 5, 10)
HISTOGRAM_BINS = 40
# Scores of unit vectors nearer to each other than float32 computes them.
TIE = 1e-6

Embeddings = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """Of one modality, row by row."""

    num_rows: int
    """Rows compared."""
    cosine_mean: float
    """Of the cosines between a row's two embeddings."""
    cosine_p1: float
    """1st percentile."""
    cosine_min: float
    """Worst row."""
    neighbour_overlap: float
    """Share of a row's ten nearest rows that are among its ten nearest by the reference."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recall:
    """Of one direction over rows that have both an image and a text."""

    direction: str
    """`text-to-image` or `image-to-text`."""
    reference: dict[int, float]
    """Cut-off -> share of queries whose own row is among the first so many, by the reference."""
    measured: dict[int, float]
    """The same by what is compared."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Thresholds:
    """How close embeddings must be to those of the reference.

    The defaults let through what retrieval hardly notices: an engine of CLIP ViT-B/16 that just
    passes them loses at most 0.0025 of recall@10 over 800 photos and captions (see README).
    """

    min_cosine_p1: float = 0.99
    """Of the rows' cosines, the 1st percentile: single rows may be odd, not many."""
    min_cosine_min: float = 0.9
    """Of the worst row: below, a row is lost, not blurred."""
    min_neighbour_overlap: float = 0.93
    """Of ten neighbours; near duplicates change places even at high cosines."""
    max_recall_loss: float = 0.01
    """Of recall@10 between images and texts, in either direction; above 0 at least of one row."""
    max_top1_loss: float = 0.01
    """Of zero-shot accuracy, where labels are given; above 0 at least of one row."""

    def __post_init__(self) -> None:
        """Check the bounds."""
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 <= value <= 1:
                raise ValueError(f"{field.name}={value}: expected 0 to 1")

    def tightened(self, factors: Mapping[str, float]) -> "Thresholds":
        """Stricter ones: field -> what share of the error it allows is allowed still."""
        return replace(
            self,
            **{name: 1 - factor * (1 - getattr(self, name)) for name, factor in factors.items()},
        )

    def faults(self, agreement: Agreement) -> list[str]:
        """What of an agreement does not pass, in words."""
        return [
            f"{what} {value:.4f} is below {bound:g}"
            for what, value, bound, _ in self._bounds(agreement)
            if not value >= bound  # NaN fails too
        ]

    def loss_factor(self, agreement: Agreement) -> float:
        """By what the mean 1 - cosine must be multiplied, about, for an agreement to pass."""
        factors = [
            ((1 - bound) / (1 - value)) ** power
            for _, value, bound, power in self._bounds(agreement)
            if value < bound
        ]
        return min(factors, default=1.0)

    def _bounds(self, agreement: Agreement) -> list[tuple[str, float, float, int]]:
        """(what, measured, at least, the power with which its error enters the mean loss)."""
        # An error of the embeddings changes neighbours in proportion to its length, and 1 - cosine
        # is half the square of that (seen so over all choices of units of a ViT-B/16).
        return [
            ("1st percentile of cosines", agreement.cosine_p1, self.min_cosine_p1, 1),
            ("lowest cosine", agreement.cosine_min, self.min_cosine_min, 1),
            (
                "overlap of ten neighbours",
                agreement.neighbour_overlap,
                self.min_neighbour_overlap,
                2,
            ),
        ]


def agreement(measured: Embeddings, reference: Embeddings) -> Agreement:
    """Compare float32 [N, D] of unit norm with a reference of the same rows."""
    cosines = row_cosines(measured, reference)
    return Agreement(
        num_rows=len(cosines),
        cosine_mean=float(cosines.mean()),
        cosine_p1=float(np.percentile(cosines, 1)),
        cosine_min=float(cosines.min()),
        neighbour_overlap=neighbour_overlap(measured, reference),
    )


def row_cosines(measured: Embeddings, reference: Embeddings) -> NDArray[np.float64]:
    """Cosine of each row of float32 [N, D] of unit norm with the same row of the reference."""
    cosines: NDArray[np.float64] = np.einsum(
        "nd,nd->n", measured.astype(np.float64), reference.astype(np.float64)
    )
    return cosines


def neighbour_overlap(measured: Embeddings, reference: Embeddings) -> float:
    """Mean share of each row's nearest ten, itself not counted, that the reference has there too.

    Rows that the reference puts as near as its tenth count as well, so that copies do no harm.
    """
    num_neighbours = min(NEIGHBOURS, len(measured) - 1)
    if num_neighbours < 1:
        return 1.0
    nearest = np.argpartition(_among_others(measured), -num_neighbours, axis=1)[:, -num_neighbours:]
    scores = _among_others(reference)
    last = np.partition(scores, -num_neighbours, axis=1)[:, -num_neighbours]
    shared = np.take_along_axis(scores, nearest, axis=1) >= last[:, None] - TIE
    return float(shared.mean())


def _among_others(embeddings: Embeddings) -> Embeddings:
    scores: Embeddings = embeddings @ embeddings.T
    np.fill_diagonal(scores, -np.inf)
    return scores


def pair_recalls(
    *, images: Embeddings, texts: Embeddings, reference: tuple[Embeddings, Embeddings]
) -> list[Recall]:
    """Recall in both directions of rows whose image and text belong together.

    Args:
        images: float32 [N, D], unit norm.
        texts: Of the same rows.
        reference: Images and texts by the reference.
    """
    reference_images, reference_texts = reference
    return [
        Recall(
            direction="text-to-image",
            reference=_recall(reference_texts, reference_images),
            measured=_recall(texts, images),
        ),
        Recall(
            direction="image-to-text",
            reference=_recall(reference_images, reference_texts),
            measured=_recall(images, texts),
        ),
    ]


def _recall(queries: Embeddings, among: Embeddings) -> dict[int, float]:
    scores = queries @ among.T
    # Rows as near as the own one do not count against it: they are copies of it. NaN does.
    ranks = (~(scores <= scores.diagonal()[:, None] + TIE)).sum(axis=1)
    return {cutoff: float(np.mean(ranks < cutoff)) for cutoff in RECALL_CUTOFFS}


def top1_accuracy(images: Embeddings, *, classes: Embeddings, labels: Sequence[int]) -> float:
    """Zero-shot: share of images whose nearest class text is that of their label.

    Args:
        images: float32 [N, D], unit norm.
        classes: float32 [C, D], the text embedding of each class.
        labels: The class of each image.
    """
    return float(np.mean((images @ classes.T).argmax(axis=1) == np.asarray(labels)))
