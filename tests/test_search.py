"""Answers of a real store: to texts, images, keys and vectors, and what cannot be asked."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.errors import IndexMissingError, QueryError, StoreError
from pipelines.indexes.filters import parse_condition
from pipelines.indexes.queries import Part, Query
from pipelines.indexing import IndexConfig, build_index
from pipelines.search import Answer, Searcher, UnknownColumnError, UnknownKeyError
from pipelines.snapshots import commit, rollback
from pipelines.store import Store
from tests.catalogs import scene_rows, stored_embeddings, stored_snapshot
from tests.searchable import searchable_store
from tests.stored import embeddings_file

ROWS = scene_rows(60)


@pytest.fixture(scope="module")
def searcher(carried_store: Path, engines_dir: Path) -> Searcher:
    return Searcher(str(carried_store), engines_uri=str(engines_dir))


@pytest.fixture(scope="module")
def vectors(carried_store: Path) -> dict[str, np.ndarray]:
    return stored_embeddings(carried_store, modality="image")


def query(**part: Any) -> Query:
    return Query(parts=(Part(**part),))


def ask(
    searcher: Searcher, *parts: Part, num_hits: int = 10, where: tuple[str, ...] = ()
) -> Answer:
    (answer,) = searcher.search(
        [Query(parts=parts)], num_hits=num_hits, where=[parse_condition(text) for text in where]
    )
    return answer


def keys(answer: Answer) -> list[str | int]:
    return [hit.key for hit in answer.hits]


def ranked(vectors: dict[str, np.ndarray], wanted: np.ndarray) -> list[str]:
    """All keys, nearest first."""
    return sorted(vectors, key=lambda key: -float(vectors[key] @ wanted))


def test_an_image_finds_itself_first(searcher: Searcher):
    asked = ROWS[::6]
    answers = searcher.search([query(image=row["image"]) for row in asked], num_hits=3)
    assert [answer.hits[0].key for answer in answers] == [row["key"] for row in asked]
    for answer in answers:
        first, second, third = answer.hits
        assert first.score == pytest.approx(1, abs=1e-4)
        assert first.score >= second.score >= third.score
        assert (answer.notes, answer.snapshot) == ((), 1)


def test_captions_find_their_pictures(searcher: Searcher):
    answers = searcher.search([query(text=row["text"]) for row in ROWS], num_hits=5)
    found = [row["key"] in keys(answer) for row, answer in zip(ROWS, answers, strict=True)]
    assert np.mean(found) >= 0.9


def test_vectors_of_any_norm_are_ranked_by_cosine(
    searcher: Searcher, vectors: dict[str, np.ndarray]
):
    wanted = vectors["k0007"]
    for scale in (1, 1e-30, 1e300):
        part = Part(vector=tuple((wanted.astype(np.float64) * scale).tolist()))
        answer = ask(searcher, part)
        assert keys(answer) == ranked(vectors, wanted)[:10]
        score = float(vectors[keys(answer)[1]] @ wanted)
        assert answer.hits[1].score == pytest.approx(score, abs=1e-5)


def test_a_query_is_the_weighted_sum_of_its_parts(
    searcher: Searcher, vectors: dict[str, np.ndarray]
):
    a, b, c = (vectors[name] for name in ("k0003", "k0014", "k0025"))
    combined = 1.0 * a + 0.5 * b - 0.7 * c
    combined /= np.linalg.norm(combined)
    parts = [
        Part(vector=tuple(map(float, 9 * a))),
        Part(image=ROWS[14]["image"], weight=0.5),
        Part(vector=tuple(map(float, c)), weight=-0.7),
    ]
    answer = ask(searcher, *parts)
    assert keys(answer) == ranked(vectors, combined)[:10]
    for hit in answer.hits:
        assert hit.score == pytest.approx(float(vectors[hit.key] @ combined), abs=1e-4)
    many = [dataclasses.replace(part, weight=part.weight * 1e200) for part in parts]
    assert keys(ask(searcher, *many)) == keys(answer)


def test_a_key_is_its_vector_and_no_hit_itself(searcher: Searcher, vectors: dict[str, np.ndarray]):
    others = [key for key in ranked(vectors, vectors["k0007"]) if key != "k0007"]
    assert keys(ask(searcher, Part(key="k0007"), num_hits=5)) == others[:5]
    assert len(keys(ask(searcher, Part(key="k0007"), num_hits=99))) == 59
    near, far = Part(key="k0007"), Part(key="k0008", weight=-0.2)
    answers = searcher.search(
        [Query(parts=(near, far)), Query(parts=(near,)), query(text="a ring")], num_hits=58
    )
    assert [len(answer.hits) for answer in answers] == [58, 58, 58]
    assert {"k0007", "k0008"}.isdisjoint(keys(answers[0]))
    assert "k0007" not in keys(answers[1])


def test_conditions_hold_for_all_hits(searcher: Searcher, vectors: dict[str, np.ndarray]):
    order = ranked(vectors, vectors["k0007"])
    part = Part(vector=tuple(map(float, vectors["k0007"])))
    acme = [key for key in order if int(key[1:]) % 3 == 0]
    assert keys(ask(searcher, part, where=("brand=acme",), num_hits=99)) == acme
    cheap = [key for key in acme if int(key[1:]) < 30]
    where = ("brand=acme", "price<30")
    assert keys(ask(searcher, part, where=where, num_hits=4)) == cheap[:4]
    both = (*where, "added>=2026-03-10", "stock=true", "size<=24")
    assert set(keys(ask(searcher, part, where=both))) == {"k0012", "k0018", "k0024"}
    assert ask(searcher, part, where=("price>1000",)).hits == ()
    # Of those allowed, the key that is asked with takes no place.
    answer = ask(searcher, Part(key="k0012"), where=both, num_hits=2)
    assert set(keys(answer)) == {"k0018", "k0024"}


def test_bitmaps_of_conditions_are_not_mistaken(searcher: Searcher):
    for number in range(12):
        for key in (f"k{number:04d}", f"k{number + 1:04d}"):
            assert keys(ask(searcher, Part(text="a ring"), where=(f"key={key}",))) == [key]
    assert len(searcher._bitmaps) == 8


def test_hits_have_their_columns_as_json_has_them(searcher: Searcher):
    assert searcher.columns == {
        "brand": "string",
        "price": "number",
        "stock": "boolean",
        "added": "time",
        "tags": "other",
        "size": "integer",
    }
    hit = ask(searcher, Part(image=ROWS[7]["image"]), num_hits=1).hits[0]
    expected = {
        "brand": "bolt",
        "price": 7.5,
        "stock": False,
        "added": "2026-03-08T00:00:00+00:00",
        "tags": ["a", "7"],
        "size": 7,
    }
    assert hit.columns == searcher.columns_of("k0007") == expected
    assert json.loads(json.dumps(hit.columns)) == expected
    assert searcher.columns_of("k9999") is None


def test_a_text_that_was_cut_is_said(searcher: Searcher):
    long = "a small red circle " * 60
    answers = searcher.search(
        [query(text="a small red circle"), Query(parts=(Part(text="a ring"), Part(text=long)))],
        num_hits=1,
    )
    assert answers[0].notes == ()
    (note,) = answers[1].notes
    assert note.startswith("text 'a small red circle a small red circle ")
    assert note.endswith("...' was cut to 32 tokens")


def test_texts_can_be_searched_too(carried_store: Path, engines_dir: Path):
    among_texts = Searcher(str(carried_store), engines_uri=str(engines_dir), modality="text")
    assert (among_texts.modality, among_texts.num_rows) == ("text", 60)
    assert keys(ask(among_texts, Part(text=ROWS[9]["text"]), num_hits=1)) == [ROWS[9]["key"]]


def test_no_more_hits_than_rows(searcher: Searcher):
    assert len(ask(searcher, Part(text="a ring"), num_hits=10**12).hits) == 60
    assert searcher.search([], num_hits=1) == []


def test_integer_keys_may_be_asked_as_text(tmp_path: Path, engines_dir: Path):
    folder = searchable_store(
        tmp_path / "store", engines_dir=engines_dir, num_rows=3, integer_keys=True
    )
    searcher = Searcher(str(folder), engines_uri=str(engines_dir))
    assert set(keys(ask(searcher, Part(key=10)))) == {0, 20}
    assert keys(ask(searcher, Part(key="10"))) == keys(ask(searcher, Part(key=10)))
    for key in ("k", "11", 2**64, "9" * 19):
        with pytest.raises(UnknownKeyError, match="its keys are of type int64"):
            ask(searcher, Part(key=key))


def test_one_row_is_enough(tmp_path: Path, engines_dir: Path):
    folder = searchable_store(tmp_path / "store", engines_dir=engines_dir, num_rows=1)
    searcher = Searcher(str(folder), engines_uri=str(engines_dir))
    assert keys(ask(searcher, Part(text="a ring"))) == ["k0000"]
    assert ask(searcher, Part(key="k0000")).hits == ()


def test_no_rows_are_no_hits(carried_store: Path, engines_dir: Path, tmp_path: Path):
    folder = tmp_path / "store"
    shutil.copytree(carried_store, folder)
    store, first = Store(str(folder)), stored_snapshot(folder)
    commit(store, dataclasses.replace(first, number=2, parent=1, files=()))
    build_index(IndexConfig(store_uri=store.uri))
    empty = Searcher(store.uri, engines_uri=str(engines_dir))
    assert (empty.num_rows, empty.columns) == (0, {})
    assert ask(empty, Part(text="a ring")).hits == ()
    with pytest.raises(UnknownKeyError):
        ask(empty, Part(key="k0000"))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([{"image": b"no picture"}], "not_an_image"),
        ([{"vector": (1.0,) * 7}], "vector has 7 numbers, the embeddings have"),
        ([{"key": "k9999"}], "no image embedding of key 'k9999' in snapshot 1"),
        ([{"key": 7}], "no image embedding of key 7 .* of type string"),
        ([{"text": "a ring"}, {"text": "a ring", "weight": -1}], "cancel out"),
    ],
)
def test_what_cannot_be_asked_is_a_value_error(
    searcher: Searcher, parts: list[dict[str, Any]], message: str
):
    with pytest.raises(ValueError, match=message):
        ask(searcher, *(Part(**part) for part in parts))


def test_other_things_that_cannot_be_asked(searcher: Searcher):
    with pytest.raises(ValueError, match="num_hits=0: expected at least 1"):
        ask(searcher, Part(text="a ring"), num_hits=0)
    with pytest.raises(UnknownColumnError, match="no column 'colour'"):
        ask(searcher, Part(text="a ring"), where=("colour=red",))
    with pytest.raises(ValueError, match=r"'tags' .* nested"):
        ask(searcher, Part(text="a ring"), where=("tags=a",))


def test_a_store_without_snapshot_index_or_modality_says_so(
    carried_store: Path, engines_dir: Path, tmp_path: Path
):
    with pytest.raises(StoreError, match="no snapshot; run `clipmill embed` first"):
        Searcher(str(tmp_path / "empty"), engines_uri=str(engines_dir))
    bare = tmp_path / "bare"
    shutil.copytree(carried_store, bare)
    shutil.rmtree(bare / "indexes")
    with pytest.raises(IndexMissingError, match="run `clipmill index"):
        Searcher(str(bare), engines_uri=str(engines_dir), modality="image")


def test_the_engine_answers_when_its_checkpoint_is_gone(
    carried_store: Path, engines_dir: Path, tmp_path: Path
):
    moved = tmp_path / "store"
    shutil.copytree(carried_store, moved)
    manifest = next((moved / "snapshots").iterdir())
    record = json.loads(manifest.read_text())
    record["engine"]["checkpoint"] = str(tmp_path / "gone")
    manifest.write_text(json.dumps(record))
    found = Searcher(str(moved), engines_uri=str(engines_dir), modality="image")
    assert ask(found, Part(text="a ring"), num_hits=1).hits


def test_after_a_rollback_answers_are_those_of_before(
    carried_store: Path, engines_dir: Path, tmp_path: Path
):
    copy = tmp_path / "store"
    shutil.copytree(carried_store, copy)
    store, first = Store(str(copy)), stored_snapshot(copy)
    queries = [query(text=row["text"]) for row in ROWS[::7]]

    def answers() -> list:
        searcher = Searcher(store.uri, engines_uri=str(engines_dir), modality="image")
        return [answer.hits for answer in searcher.search(queries, num_hits=10)]

    before = answers()
    vectors = stored_embeddings(copy, modality="image")
    fewer = embeddings_file(store, {key: vectors[key] for key in sorted(vectors)[:20]})
    texts_stay = first.files_of("embeddings", modality="text")
    commit(store, dataclasses.replace(first, number=2, parent=1, files=(fewer, *texts_stay)))
    with pytest.raises(IndexMissingError, match="snapshot 2; run `clipmill index"):
        answers()
    build_index(IndexConfig(store_uri=store.uri))
    assert answers() != before
    rollback(store, 1)
    assert answers() == before


def test_long_values_are_cut_in_errors(searcher: Searcher):
    long = "x" * 5_000
    for part, where in (
        (Part(key=long), ""),
        (Part(text="a"), f"{long}=1"),
        (Part(text="a"), f"price={long}"),
        (Part(text="a"), "price=" + "acme|" * 1_000),
    ):
        with pytest.raises(QueryError) as raised:
            ask(searcher, part, where=(where,) if where else ())
        assert len(str(raised.value)) < 400
