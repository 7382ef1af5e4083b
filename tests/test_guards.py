"""Tests of pipelines/guarding/guards.py and vector_guards.py, on stores whose vectors are known."""

import dataclasses
import json
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pytest

from pipelines import schema
from pipelines.counts import Counts
from pipelines.errors import GuardError
from pipelines.guarding.candidate import Candidate
from pipelines.guarding.guard_limits import GuardLimits
from pipelines.guarding.guards import check, measure, measure_index
from pipelines.lineage import Measurement
from pipelines.snapshots import EngineRecord, Snapshot, StoredFile
from pipelines.store import Store
from pipelines.writing import write_table
from tests.stored import embeddings_file, index_manifest, make_snapshot

DIM = 16
LIMITS = GuardLimits()


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(str(tmp_path / "store"))


def unit_vectors(num_rows: int, *, seed: int = 0, shift: float = 1.0) -> np.ndarray:
    """Around one direction, as embeddings are."""
    vectors = np.random.default_rng(seed).normal(size=(num_rows, DIM)).astype(np.float32)
    vectors[:, 0] += 4 * shift
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def keyed(vectors: np.ndarray, *, first: int = 0) -> dict[str, np.ndarray]:
    return {f"k{first + row:04d}": vector for row, vector in enumerate(vectors)}


def snapshot_of(*files: StoredFile, number: int = 1, **changes) -> Snapshot:
    """Its catalog has as many keys as there are rows."""
    snapshot = make_snapshot(files, number=number, embedding_dim=DIM)
    num_keys = sum(file.num_rows for file in files)
    catalog = dataclasses.replace(snapshot.catalog, num_keys=num_keys)
    return dataclasses.replace(snapshot, catalog=catalog, **changes)


def rejects_file(store: Store, num_rows: int, *, first: int = 5000) -> StoredFile:
    rows = [
        {
            "key": f"k{first + row:04d}",
            "modality": "image",
            "stage": "decode",
            "reason": "null_image",
            "source_file": "a.parquet",
            "source_row": row,
        }
        for row in range(num_rows)
    ]
    table = pa.Table.from_pylist(rows, schema=schema.rejects_schema(key_type=pa.string()))
    return write_table(table, kind="rejects", modality="image", plan_id="plan", store=store)


def of_json(measurement: Measurement) -> Measurement:
    """It goes into a manifest."""
    return Measurement(**json.loads(json.dumps(dataclasses.asdict(measurement))))


def measured(
    store: Store,
    snapshot: Snapshot,
    parent: Snapshot | None = None,
    limits: GuardLimits = LIMITS,
    encoded: Sequence[StoredFile] | None = None,
) -> Mapping[str, Measurement]:
    """Encoded were, if nothing is said, the embeddings that the parent does not have."""
    if encoded is None:
        before = () if parent is None else parent.files
        encoded = [file for file in snapshot.files_of("embeddings") if file not in before]
    candidate = Candidate(
        snapshot=snapshot,
        parent=parent,
        encoded=tuple(encoded),
        counts=Counts(num_rows=0, num_keys=0, num_due_rows=0, keys={}),
        num_rejected=0,
    )
    found = measure(store, candidate, limits=limits)
    assert len({measurement.guard for measurement in found}) == len(found)
    assert [of_json(measurement) for measurement in found] == found
    return {measurement.guard: measurement for measurement in found}


def test_a_first_snapshot_is_compared_with_nothing(store):
    found = measured(store, snapshot_of(embeddings_file(store, keyed(unit_vectors(50)))))
    assert found.keys() == {"rejects", "norms"}
    assert not any(measurement.is_tripped for measurement in found.values())


def test_a_usual_night_trips_nothing(store):
    kept = embeddings_file(store, keyed(unit_vectors(1000)))
    gone = embeddings_file(store, keyed(unit_vectors(5), first=200))
    new = embeddings_file(store, keyed(unit_vectors(8, seed=1), first=300))
    found = measured(store, snapshot_of(kept, new, number=2), snapshot_of(kept, gone))
    assert found.keys() == {"rejects", "deletions", "norms", "drift"}
    assert not any(measurement.is_tripped for measurement in found.values())
    assert found["deletions"].value == pytest.approx(5 / 1005)
    assert "8 new embeddings" in found["norms"].detail
    assert found["drift"].value > 0.99


@pytest.mark.parametrize(
    ("num_embedded", "num_rejects", "is_tripped"),
    [(180, 20, False), (179, 20, True), (20, 19, False)],
)
def test_rejects(store, num_embedded, num_rejects, is_tripped):
    snapshot = snapshot_of(
        embeddings_file(store, keyed(unit_vectors(num_embedded))), rejects_file(store, num_rejects)
    )
    found = measured(store, snapshot)["rejects"]
    assert found.value == pytest.approx(num_rejects / (num_embedded + num_rejects))
    assert (found.modality, found.is_tripped) == ("image", is_tripped)


@pytest.mark.parametrize(
    ("num_kept", "num_gone", "is_tripped"), [(80, 20, False), (79, 20, True), (10, 19, False)]
)
def test_deletions(store, num_kept, num_gone, is_tripped):
    kept = embeddings_file(store, keyed(unit_vectors(num_kept)))
    gone = embeddings_file(store, keyed(unit_vectors(num_gone), first=1000))
    # As many keys come as go: their number says nothing.
    new = embeddings_file(store, keyed(unit_vectors(num_gone), first=2000))
    found = measured(store, snapshot_of(kept, new, number=2), snapshot_of(kept, gone))
    assert found["deletions"].value == pytest.approx(num_gone / (num_kept + num_gone))
    assert found["deletions"].is_tripped is is_tripped


def test_a_key_that_is_rejected_now_is_not_deleted(store):
    before = snapshot_of(embeddings_file(store, keyed(unit_vectors(60))))
    after = snapshot_of(rejects_file(store, 60, first=0), number=2)
    found = measured(store, after, before)
    assert found["deletions"].value == 0
    assert found["rejects"].is_tripped


@pytest.mark.parametrize("num_rows", [3, 300])
def test_an_empty_catalog_trips_however_small_the_store(store, num_rows):
    before = snapshot_of(embeddings_file(store, keyed(unit_vectors(num_rows))))
    found = measured(store, snapshot_of(number=2), before)
    assert found["deletions"].is_tripped
    assert found["deletions"].value == 1
    assert f"{num_rows} of {num_rows} keys of snapshot 1 are gone, the catalog is empty" in (
        found["deletions"].detail
    )
    assert found.keys() == {"rejects", "deletions"}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(
    ("factor", "num_off"), [(1.0, 0), (1.005, 0), (1.02, 1), (0.98, 1), (0.0, 1), (np.nan, 1)]
)
def test_norms(store, dtype, factor, num_off):
    old = embeddings_file(store, keyed(3 * unit_vectors(50)), dtype=dtype)
    vectors = unit_vectors(40, seed=1)
    vectors[7] *= factor
    new = embeddings_file(store, keyed(vectors, first=100), dtype=dtype)
    found = measured(store, snapshot_of(old, new, number=2), snapshot_of(old))["norms"]
    assert found.value == pytest.approx(num_off / 40)
    assert found.is_tripped is (num_off > 0)


@pytest.mark.parametrize(("shift", "is_tripped"), [(1.0, False), (-1.0, True)])
def test_drift(store, shift, is_tripped):
    before = snapshot_of(embeddings_file(store, keyed(unit_vectors(1000))))
    now = embeddings_file(store, keyed(unit_vectors(1000, seed=1, shift=shift)))
    found = measured(store, snapshot_of(now, number=2), before)["drift"]
    assert found.is_tripped is is_tripped
    assert found.value == pytest.approx(shift, abs=0.01)


def in_which(store: Store, vectors: np.ndarray, *, are: Mapping[int, np.ndarray]) -> StoredFile:
    """A file written anew with some rows replaced."""
    return embeddings_file(store, keyed(np.stack([are.get(n, v) for n, v in enumerate(vectors)])))


def test_a_collapse_of_a_tenth_is_seen_in_files_written_anew(store):
    """Among all rows, neither the norms nor the mean would tell."""
    vectors = unit_vectors(12_000)
    one = np.eye(DIM, dtype=np.float32)[1]
    replaced = dict.fromkeys(range(0, 12000, 10), one)
    encoded = embeddings_file(store, keyed(np.stack(list(replaced.values()))))
    before = snapshot_of(embeddings_file(store, keyed(vectors)))
    after = snapshot_of(in_which(store, vectors, are=replaced), number=2)
    found = measured(store, after, before, encoded=[encoded])
    assert {name for name, of in found.items() if of.is_tripped} == {"new_drift", "collapse"}
    assert found["collapse"].value == pytest.approx(1)
    assert "1,200 new embeddings, 0.7" in found["collapse"].detail
    assert found["new_drift"].value < 0.3 < 0.9 < found["drift"].value
    # The next night: all of that is the parent's, and another tenth is all it takes.
    again = {**replaced, **dict.fromkeys(range(1, 12000, 10), one)}
    next_night = snapshot_of(in_which(store, vectors, are=again), number=3)
    found = measured(store, next_night, after, encoded=[encoded])
    assert {name for name, of in found.items() if of.is_tripped} == {"new_drift", "collapse"}


def test_noise_among_the_new_drifts(store):
    noise = np.random.default_rng(1).normal(size=(1000, DIM)).astype(np.float32)
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    old = embeddings_file(store, keyed(unit_vectors(9000)))
    new = embeddings_file(store, keyed(noise - noise.mean(axis=0), first=9000))
    limits = GuardLimits(max_norms=1)
    found = measured(store, snapshot_of(old, new, number=2), snapshot_of(old), limits)
    assert {name for name, of in found.items() if of.is_tripped} == {"new_drift"}


def test_another_category_neither_drifts_nor_collapses(store):
    category = unit_vectors(1000, seed=1)
    category[:, 1] += 1
    category /= np.linalg.norm(category, axis=1, keepdims=True)
    old = embeddings_file(store, keyed(unit_vectors(4000)))
    new = embeddings_file(store, keyed(category, first=4000))
    found = measured(store, snapshot_of(old, new, number=2), snapshot_of(old))
    assert found.keys() >= {"new_drift", "collapse"}
    assert not any(measurement.is_tripped for measurement in found.values())


def test_new_rows_do_not_drift_from_embeddings_without_a_direction(store):
    old = embeddings_file(store, keyed(unit_vectors(1000, shift=0.2)))
    new = embeddings_file(store, keyed(unit_vectors(1000, seed=1, shift=-0.2), first=1000))
    found = measured(store, snapshot_of(old, new, number=2), snapshot_of(old))
    assert "new_drift" not in found
    assert not found["collapse"].is_tripped


@pytest.mark.parametrize(("num_rows", "is_measured"), [(99, False), (100, True)])
def test_few_rows_may_be_alike(store, num_rows, is_measured):
    old = embeddings_file(store, keyed(unit_vectors(1000)))
    new = embeddings_file(store, keyed(np.tile(unit_vectors(1), (num_rows, 1)), first=1000))
    found = measured(store, snapshot_of(old, new, number=2), snapshot_of(old))
    assert ("collapse" in found) is is_measured
    if is_measured:
        assert found["collapse"].is_tripped


def test_rows_that_were_alike_before_may_be_so_again(store):
    alike = np.tile(unit_vectors(1), (200, 1))
    old = embeddings_file(store, keyed(alike))
    new = embeddings_file(store, keyed(alike, first=200))
    found = measured(store, snapshot_of(old, new, number=2), snapshot_of(old))
    assert not found["collapse"].is_tripped


def test_embeddings_that_are_no_numbers_have_collapsed(store):
    old = embeddings_file(store, keyed(unit_vectors(1000)))
    new = embeddings_file(store, keyed(np.full((1000, DIM), np.nan), first=1000))
    found = measured(store, snapshot_of(old, new, number=2), snapshot_of(old))
    assert all(found[name].is_tripped for name in ("norms", "drift", "new_drift", "collapse"))


def test_norms_are_those_of_what_was_encoded(store):
    """Not of the file written anew, whose sample would miss two of many."""
    vectors = unit_vectors(20_000)
    halves = {row: vectors[row] / 2 for row in (7, 19_007)}
    encoded = embeddings_file(store, keyed(np.stack(list(halves.values()))))
    before = snapshot_of(embeddings_file(store, keyed(vectors)))
    after = snapshot_of(in_which(store, vectors, are=halves), number=2)
    found = measured(store, after, before, encoded=[encoded])["norms"]
    assert (found.value, found.is_tripped) == (1.0, True)


@pytest.mark.parametrize(
    ("num_unkeyed", "num_embedded", "is_tripped"),
    [(19, 60, False), (20, 60, True), (20, 180, False), (3, 0, True)],
)
def test_rows_without_a_key_of_their_own_are_rejects(store, num_unkeyed, num_embedded, is_tripped):
    rows = [
        {"stage": "plan", "reason": "null_key", "source_file": "a.parquet", "source_row": row}
        for row in range(num_unkeyed)
    ]
    table = pa.Table.from_pylist(rows, schema=schema.rejects_schema(key_type=pa.string()))
    unkeyed = write_table(table, kind="rejects", modality=None, plan_id="plan", store=store)
    files = [embeddings_file(store, keyed(unit_vectors(num_embedded)))] if num_embedded else []
    snapshot = snapshot_of(*files)
    catalog = dataclasses.replace(snapshot.catalog, num_rows=num_embedded + num_unkeyed)
    snapshot = dataclasses.replace(snapshot, files=(*files, unkeyed), catalog=catalog)
    found = check_unkeyed(store, snapshot)
    assert found.value == pytest.approx(num_unkeyed / (num_embedded + num_unkeyed))
    assert found.is_tripped is is_tripped
    assert ("none has a key" in found.detail) is (num_embedded == 0)


def check_unkeyed(store: Store, snapshot: Snapshot) -> Measurement:
    candidate = Candidate(
        snapshot=snapshot,
        parent=None,
        encoded=(),
        counts=Counts(num_rows=0, num_keys=0, num_due_rows=0, keys={}),
        num_rejected=0,
    )
    found, of_images = measure(store, candidate, limits=LIMITS)
    assert [found.guard, found.modality] == ["rejects", None]
    assert (of_images.modality, of_images.is_tripped) == ("image", False)
    return found


def test_the_means_of_few_rows_say_nothing(store):
    before = snapshot_of(embeddings_file(store, keyed(unit_vectors(1000))))
    now = embeddings_file(store, keyed(unit_vectors(999, shift=-1)))
    assert "drift" not in measured(store, snapshot_of(now, number=2), before)


@pytest.mark.parametrize(
    ("noise", "is_tripped"), [(0.0, False), (0.02, False), (5.0, True), (np.nan, True)]
)
def test_neighbours_after_a_change_of_engine(store, noise, is_tripped):
    vectors = unit_vectors(200)
    before = snapshot_of(embeddings_file(store, keyed(vectors)))
    # Other directions, the same neighbours: no drift can be told, and none is.
    now = vectors[:, ::-1] + noise * np.random.default_rng(1).normal(size=vectors.shape)
    now = now / np.linalg.norm(now, axis=1, keepdims=True)
    parts = [
        embeddings_file(store, keyed(now[first : first + 50], first=first))
        for first in range(0, 200, 50)
    ]
    engine = EngineRecord(engine_id="fp8-1", checkpoint="acme/clip", revision="main")
    found = measured(store, snapshot_of(*parts, number=2, engine=engine), before)
    assert "drift" not in found
    assert found["neighbours"].is_tripped is is_tripped
    if noise == 0:
        assert found["neighbours"].value == 1
    assert "10 neighbours of 200 keys, by engine fp8-1" in found["neighbours"].detail


@pytest.mark.parametrize(
    ("num_before", "num_now", "num_shared", "is_tripped"),
    [
        *[(99, 200, 99, None), (200, 99, 99, None), (100, 100, 100, False)],
        *[(200, 200, 99, True), (200, 200, 0, True)],
    ],
)
def test_neighbours_of_too_few_keys(store, num_before, num_now, num_shared, is_tripped):
    """Small stores pass without a word; large ones that share too little do not."""
    vectors = unit_vectors(400)
    before = snapshot_of(embeddings_file(store, keyed(vectors[:num_before])))
    first = num_before - num_shared
    now = embeddings_file(store, keyed(vectors[first : first + num_now], first=first))
    engine = EngineRecord(engine_id="fp8-1", checkpoint="acme/clip", revision="main")
    found = measured(store, snapshot_of(now, number=2, engine=engine), before).get("neighbours")
    assert (found and found.is_tripped) is is_tripped


def test_recall_is_that_of_the_queries_that_find_least():
    (found,) = measure_index(index_manifest(image=0.96, text=0.94), limits=LIMITS)
    assert (found.guard, found.value, found.is_tripped) == ("recall", 0.94, True)
    assert found.detail == ("10 nearest of 512 text queries among 700 embeddings, by IVF64,SQ8")
    assert of_json(found) == found
    (found,) = measure_index(index_manifest(image=0.96, text=0.95), limits=LIMITS)
    assert not found.is_tripped


def test_an_index_of_no_rows_has_no_recall():
    assert measure_index(index_manifest(), limits=LIMITS) == []


def trip(guard, value: float, *, is_tripped: bool = True) -> Measurement:
    return Measurement(
        guard=guard,
        modality=None if guard == "deletions" else "text",
        value=value,
        bound=0.2,
        is_tripped=is_tripped,
        detail="some",
    )


def test_all_that_tripped_is_named_with_the_way_out():
    found = [trip("rejects", 0.1, is_tripped=False), trip("deletions", 0.5), trip("drift", 0.125)]
    with pytest.raises(GuardError) as caught:
        check(found, accepted=(), outcome="Nothing was committed.")
    assert str(caught.value) == (
        "guards tripped:\n"
        "  - deletions: 0.5000, at most 0.2 is allowed (some)\n"
        "  - drift of text: 0.1250, at least 0.2 is allowed (some)\n"
        "Nothing was committed. If this is as it should be, run the same command with "
        "--accept deletions --accept drift; otherwise mend the cause and run it again"
    )
    with pytest.raises(GuardError, match="with --accept drift;") as caught:
        check(found, accepted=("deletions",), outcome="")
    assert "deletions" not in str(caught.value)
    check(found, accepted=("deletions", "drift"), outcome="")


@pytest.mark.parametrize("bound", [{"max_rejects": 1.5}, {"min_recall": -0.1}, {"min_drift": -2}])
def test_bounds_are_shares_or_cosines(bound):
    with pytest.raises(ValueError, match=f"{next(iter(bound))}=.*: expected"):
        GuardLimits(**bound)
    with pytest.raises(ValueError, match="max_norms=nan"):
        GuardLimits(max_norms=float("nan"))
