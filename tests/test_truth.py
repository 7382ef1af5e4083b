"""Tests of pipelines/indexes/truth.py: exact answers, in parts and over changes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.indexes import truth as truth_module
from pipelines.indexes.bitmaps import bitmap_of
from pipelines.indexes.truth import Truth

DIM = 6
NUM_QUERIES = 4


def vectors_of(num_rows: int, *, seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(num_rows, DIM)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def asked(*, own_ids: list[int] | None = None) -> Truth:
    ids = np.array(own_ids or [-1] * NUM_QUERIES)
    return Truth.unanswered([("image", vectors_of(NUM_QUERIES, seed=99), ids)], embedding_dim=DIM)


def known(truth: Truth, rows: dict[int, np.ndarray]) -> None:
    """All that it says is what numpy says, as far as it goes."""
    ids = np.array(sorted(rows))
    matrix = np.stack([rows[row_id] for row_id in ids])
    for query in range(NUM_QUERIES):
        cosines = matrix @ truth.vectors[query]
        cosines[ids == truth.own_ids[query]] = -np.inf
        order = np.argsort(-cosines, kind="stable")
        num_known = int((truth.ids[query] >= 0).sum())
        assert np.allclose(truth.scores[query, :num_known], cosines[order[:num_known]], atol=1e-5)
        of_id = {int(row_id): cosine for row_id, cosine in zip(ids, cosines, strict=True)}
        found = [of_id[int(row_id)] for row_id in truth.ids[query, :num_known]]
        assert np.allclose(found, truth.scores[query, :num_known], atol=1e-5)
        assert len(set(truth.ids[query, :num_known].tolist())) == num_known


NIGHTS = st.lists(st.tuples(st.sets(st.integers(0, 79)), st.integers(0, 15)), max_size=4)


@settings(max_examples=30)
@given(nights=NIGHTS, depth=st.integers(2, 30))
def test_answers_stay_exact_over_changes(nights, depth):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(truth_module, "DEPTH", depth)
        rows = dict(enumerate(vectors_of(80, seed=1)))
        truth = asked(own_ids=[3, -1, 7, -1])
        for first in (0, 30, 60):
            ids = np.arange(first, min(first + 30, 80))
            truth = truth.with_rows(np.stack([rows[row_id] for row_id in ids]), ids)
        known(truth, rows)
        assert (truth.ids >= 0).all()
        for night, (removed, num_added) in enumerate(nights):
            gone = np.array(sorted(removed & rows.keys()), dtype=np.int64)
            truth = truth.without(bitmap_of(gone, num_ids=200))
            for row_id in gone.tolist():
                del rows[row_id]
            free = [row_id for row_id in range(200) if row_id not in rows][:num_added]
            added = vectors_of(num_added, seed=night + 10)
            rows |= dict(zip(free, added, strict=True))
            truth = truth.with_rows(added, np.array(free, dtype=np.int64))
            if rows:
                known(truth, rows)


def test_parts_together_are_the_whole():
    rows = vectors_of(700, seed=1)
    ids = np.random.default_rng(0).permutation(700)
    whole = asked().with_rows(rows, ids)
    parts = [
        asked().with_rows(rows[part], ids[part]) for part in np.split(np.arange(700), [250, 400])
    ]
    merged = asked()
    for part in parts:
        merged = merged.merged(part)
    assert np.array_equal(merged.ids, whole.ids)
    assert np.allclose(merged.scores, whole.scores, atol=1e-6)


def test_it_knows_when_too_many_answers_are_gone():
    rows = vectors_of(700, seed=1)
    truth = asked().with_rows(rows, np.arange(700))
    assert truth.is_deep_enough(700)
    assert truth.without(bitmap_of(truth.ids[0, :100], num_ids=700)).is_deep_enough(600)
    shallow = truth.without(bitmap_of(truth.ids[0, :101], num_ids=700))
    assert not shallow.is_deep_enough(599)
    again = shallow.unanswered_again().with_rows(rows[:50], np.arange(50))
    assert again.is_deep_enough(50)
    assert not again.is_deep_enough(51)


def test_it_is_read_back_as_it_was():
    truth = asked(own_ids=[3, -1, 7, -1]).with_rows(vectors_of(40, seed=1), np.arange(40))
    again = Truth.from_bytes(truth.to_bytes())
    for name in ("kind_of", "vectors", "own_ids", "ids", "scores", "floors"):
        assert np.array_equal(getattr(again, name), getattr(truth, name))
    assert again.kinds == ("image",)
    with pytest.raises(ValueError, match="no arrays can be read"):
        Truth.from_bytes(truth.to_bytes()[:100])
