"""Guards that look at embeddings: norms, means, and neighbours, of samples.

Knows nothing of what is done about a guard that trips.

What a run encoded is judged by itself: among all rows of a store, or of files that were written
anew for the sake of a few, a bad night would not be seen.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from engine.accuracy import NEIGHBOURS, neighbour_overlap
from pipelines.guarding.candidate import Candidate
from pipelines.guarding.guard_limits import GuardLimits
from pipelines.guarding.stored_samples import draw_pairs, draw_sample
from pipelines.lineage import Measurement
from pipelines.schema import Modality
from pipelines.snapshots import Snapshot, is_other_engine
from pipelines.store import Store

Vectors = NDArray[np.float32]

# Of a norm from 1; float16 elements round it by less than 1e-3.
NORM_TOLERANCE = 1e-2
# Of embeddings that spread widely, the means of a few hundred differ by chance alone.
MIN_ROWS_OF_MEAN = 1000
# Of embeddings that share less of a direction, a category's mean may point anywhere: of the demo's
# captions (0.2 long) one has a cosine of -0.3, of its images (0.6 long) all have 0.5 and more.
MIN_LENGTH_OF_MEAN = 0.5
# Fewer may honestly be alike: a product in all its colours.
MIN_ROWS_TO_COLLAPSE = 100
# Of fewer, the nearest ten are so many that chance finds them.
MIN_PAIRS = 100


def measure_vectors(
    store: Store, candidate: Candidate, *, limits: GuardLimits
) -> Iterator[Measurement]:
    """Measure the embeddings of each modality.

    Raises:
        StoreError: The store cannot be read.
    """
    parent = candidate.parent
    for modality in candidate.snapshot.modalities:
        encoded = [file for file in candidate.encoded if file.modality == modality]
        sample = draw_sample(store, encoded)
        new = None if sample is None else sample.vectors
        if new is not None:
            yield _norms(new, modality=modality, limits=limits)
        if parent is None:
            continue
        if is_other_engine(candidate.snapshot.engine, parent):
            yield from _neighbours(
                store, candidate.snapshot, parent, modality=modality, limits=limits
            )
            continue
        now, before = (
            draw_sample(store, snapshot.files_of("embeddings", modality=modality))
            for snapshot in (candidate.snapshot, parent)
        )
        if now is not None and before is not None:
            yield from _drift(now.vectors, before.vectors, modality=modality, limits=limits)
        if new is not None and before is not None:
            yield from _new_drift(new, before.vectors, modality=modality, limits=limits)
            yield from _collapse(new, before.vectors, modality=modality, limits=limits)


def _norms(new: Vectors, *, modality: Modality, limits: GuardLimits) -> Measurement:
    norms = np.linalg.norm(new, axis=1)
    is_off = ~(np.abs(norms - 1) <= NORM_TOLERANCE)  # of NaN too
    share = float(is_off.mean())
    return Measurement(
        guard="norms",
        modality=modality,
        value=share,
        bound=limits.max_norms,
        is_tripped=share > limits.max_norms,
        detail=f"{is_off.sum():,} of {len(norms):,} new embeddings",
    )


def _drift(
    now: Vectors, before: Vectors, *, modality: Modality, limits: GuardLimits
) -> Iterator[Measurement]:
    if min(len(now), len(before)) >= MIN_ROWS_OF_MEAN:
        cosine = _cosine(_mean(now), _mean(before))
        yield Measurement(
            guard="drift",
            modality=modality,
            value=cosine,
            bound=limits.min_drift,
            is_tripped=cosine < limits.min_drift,
            detail=f"means of {len(now):,} and {len(before):,} embeddings",
        )


def _new_drift(
    new: Vectors, before: Vectors, *, modality: Modality, limits: GuardLimits
) -> Iterator[Measurement]:
    mean_before = _mean(before)
    is_shared = np.linalg.norm(mean_before) >= MIN_LENGTH_OF_MEAN
    if is_shared and min(len(new), len(before)) >= MIN_ROWS_OF_MEAN:
        cosine = _cosine(_mean(new), mean_before)
        yield Measurement(
            guard="new_drift",
            modality=modality,
            value=cosine,
            bound=limits.min_new_drift,
            is_tripped=cosine < limits.min_new_drift,
            detail=f"means of {len(new):,} new embeddings and {len(before):,} before",
        )


def _collapse(
    new: Vectors, before: Vectors, *, modality: Modality, limits: GuardLimits
) -> Iterator[Measurement]:
    if min(len(new), len(before)) >= MIN_ROWS_TO_COLLAPSE:
        length, length_before = (float(np.linalg.norm(_mean(part))) for part in (new, before))
        length = length if np.isfinite(length) else 1.0  # NaN tells no two rows apart
        yield Measurement(
            guard="collapse",
            modality=modality,
            value=length,
            bound=limits.max_collapse,
            is_tripped=length > limits.max_collapse >= length_before,
            detail=f"length of the mean of {len(new):,} new embeddings, {length_before:.2f} before",
        )


def _neighbours(
    store: Store,
    snapshot: Snapshot,
    parent: Snapshot,
    *,
    modality: Modality,
    limits: GuardLimits,
) -> Iterator[Measurement]:
    before, now = (of.files_of("embeddings", modality=modality) for of in (parent, snapshot))
    if min(sum(file.num_rows for file in files) for files in (before, now)) < MIN_PAIRS:
        return
    pairs = draw_pairs(store, before, now)
    num_pairs = 0 if pairs is None else len(pairs[0])
    # Stores that share no more than this cannot be compared, which is no reason to let them pass.
    overlap = 0.0
    if pairs is not None and num_pairs >= MIN_PAIRS:
        overlap = neighbour_overlap(pairs[1], pairs[0])
    yield Measurement(
        guard="neighbours",
        modality=modality,
        value=overlap,
        bound=limits.min_neighbours,
        is_tripped=overlap < limits.min_neighbours,
        detail=f"{NEIGHBOURS} neighbours of {num_pairs:,} keys, by engine "
        f"{snapshot.engine.engine_id} and by {parent.engine.engine_id}"
        + ("" if num_pairs >= MIN_PAIRS else f"; of fewer than {MIN_PAIRS} chance finds them"),
    )


def _mean(vectors: Vectors) -> NDArray[np.float64]:
    mean: NDArray[np.float64] = vectors.mean(axis=0, dtype=np.float64)
    return mean


def _cosine(now: NDArray[np.float64], before: NDArray[np.float64]) -> float:
    norms = np.linalg.norm(now) * np.linalg.norm(before)
    cosine = float(now @ before / max(norms, np.finfo(float).tiny))
    return cosine if np.isfinite(cosine) else -1.0
