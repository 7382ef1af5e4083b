"""Tests of pipelines/retrieval.py, on vectors whose neighbours are plain to see."""

import pytest

from pipelines.errors import IndexMissingError, StoreError
from pipelines.indexing import IndexConfig, build_index
from pipelines.retrieval import PairRecall, pair_recall, recall_line
from pipelines.store import Store
from tests.stored import commit_vectors

# Each image lies on an axis of its own.
IMAGES = {
    "a": [1.0, 0.0, 0.0, 0.0],
    "b": [0.0, 1.0, 0.0, 0.0],
    "c": [0.0, 0.0, 1.0, 0.0],
    "no text": [0.0, 0.0, 0.0, 1.0],
}
# The own image is first of a's text, second of b's, last of c's.
TEXTS = {
    "a": [0.8, 0.4, 0.4, 0.2],
    "b": [0.8, 0.6, 0.0, 0.0],
    "c": [0.7, 0.5, 0.1, 0.5],
    "no image": [0.5, 0.5, 0.5, 0.5],
}


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(str(tmp_path))


def split(vectors, num_first):
    rows = list(vectors.items())
    return [dict(rows[:num_first]), dict(rows[num_first:])]


def measured(store, **options):
    return {(result.query, result.among): result for result in pair_recall(store.uri, **options)}


def test_recall_of_vectors_whose_ranks_are_known(store):
    commit_vectors(store, image=split(IMAGES, 3), text=split(TEXTS, 1))
    build_index(IndexConfig(store_uri=store.uri))
    results = measured(store, ks=(1, 2, 3, 4))
    assert set(results) == {("text", "image"), ("image", "text")}
    by_text = results["text", "image"]
    assert by_text.recall == pytest.approx({1: 1 / 3, 2: 2 / 3, 3: 2 / 3, 4: 1})
    assert (by_text.num_queries, by_text.num_rows) == (3, 4)
    assert by_text.search_seconds > 0
    # Of the images, a and b find their own text among the first two; c finds "no image", a, c.
    by_image = results["image", "text"]
    assert by_image.num_queries == 3
    assert by_image.recall[3] == 1
    assert by_image.recall[2] == pytest.approx(2 / 3)


def test_files_beyond_the_most_queries_are_not_read(store):
    snapshot = commit_vectors(store, image=split(IMAGES, 2), text=split(TEXTS, 2))
    build_index(IndexConfig(store_uri=store.uri))
    for modality in ("image", "text"):
        store.remove(snapshot.files_of("embeddings", modality=modality)[1].path)
    assert [result.num_queries for result in pair_recall(store.uri, max_queries=2)] == [2, 2]
    with pytest.raises(StoreError, match="cannot be read"):
        pair_recall(store.uri, max_queries=3)


def test_more_neighbours_than_rows_are_all_of_them(store):
    commit_vectors(store, image=[IMAGES], text=[TEXTS])
    build_index(IndexConfig(store_uri=store.uri))
    assert measured(store, ks=(1, 100))["text", "image"].recall == pytest.approx({1: 1 / 3, 100: 1})


def test_of_more_pairs_the_first_are_asked(store):
    commit_vectors(store, image=[IMAGES], text=split(TEXTS, 1))
    build_index(IndexConfig(store_uri=store.uri))
    one = measured(store, ks=(1,), max_queries=1)["text", "image"]
    assert (one.num_queries, one.recall) == (1, {1: 1})
    two = measured(store, ks=(1,), max_queries=2)["text", "image"]
    assert (two.num_queries, two.recall) == (2, {1: 0.5})


def test_integer_keys_pair_too(store):
    commit_vectors(store, image=[{1: [1.0, 0.0], 2: [0.0, 1.0]}], text=[{2: [0.0, 1.0]}])
    build_index(IndexConfig(store_uri=store.uri))
    assert measured(store, ks=(1,))["text", "image"].recall == {1: 1}


def test_without_a_common_key_nothing_is_recalled(store):
    commit_vectors(store, image=[{"a": [1.0, 0.0]}], text=[{"b": [1.0, 0.0]}])
    build_index(IndexConfig(store_uri=store.uri))
    result = measured(store)["text", "image"]
    assert (result.num_queries, result.recall) == (0, {1: 0, 5: 0, 10: 0})


def test_a_store_without_pairs_is_refused(store):
    with pytest.raises(StoreError, match="no pairs"):
        pair_recall(store.uri)
    commit_vectors(store, image=[IMAGES])
    with pytest.raises(StoreError, match="no pairs"):
        pair_recall(store.uri)


def test_a_store_without_an_index_is_refused(store):
    commit_vectors(store, image=[IMAGES], text=[TEXTS])
    with pytest.raises(IndexMissingError, match="clipmill index"):
        pair_recall(store.uri)


@pytest.mark.parametrize("ks", [(), (0, 1)])
def test_cut_offs_below_one_are_refused(store, ks):
    with pytest.raises(ValueError, match="expected cut-offs of at least 1"):
        pair_recall(store.uri, ks=ks)


def test_a_result_in_one_line():
    result = PairRecall(
        query="text",
        among="image",
        num_queries=1234,
        num_rows=56789,
        recall={1: 0.5, 10: 0.98765},
        search_seconds=0.00123,
    )
    assert recall_line(result) == (
        "text-to-image recall @1 0.500, @10 0.988 (1,234 queries, 56,789 rows, 1.23 ms a search)"
    )
