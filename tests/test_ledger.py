"""Tests of pipelines/ledger.py, case by case and against a model of it in plain Python."""

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import schema
from pipelines.ledger import Ledger
from pipelines.schema import MODALITIES, Modality
from pipelines.snapshots import Kind, StoredFile
from tests.stored import fingerprint

Key = str | int | None


@dataclass(frozen=True)
class Row:
    """One row of the catalog; contents None are null."""

    file: str
    row: int
    key: Key
    image: str | None = None
    text: str | None = None


@dataclass(frozen=True)
class Stored:
    """One stored file with (key, content) of each row."""

    path: str
    modality: Modality
    rows: Sequence[tuple[Key, str | None]]
    staged: bool = False
    kind: Kind = "embeddings"
    retried: Sequence[Key] = ()
    reason: str = "not_an_image"
    """Of rejects."""


def as_blob(content: str | None) -> bytes | None:
    return None if content is None else fingerprint(content)


def settled(
    rows: Iterable[Row],
    stored: Iterable[Stored] = (),
    *,
    trusted: Iterable[str] = (),
    modalities: Sequence[Modality] = ("image",),
    key_type: pa.DataType | None = None,
    by_content: Sequence[Modality] = (),
) -> Ledger:
    """A ledger of these rows; files named in `trusted` are added as such."""
    key_type = key_type or pa.string()
    ledger = Ledger(key_type=key_type, modalities=modalities, by_content=by_content)
    by_file = defaultdict(list)
    for row in rows:
        by_file[row.file].append(row)
    for file, of_file in by_file.items():
        columns: dict[str, Any] = {
            schema.SOURCE_FILE: [file] * len(of_file),
            schema.SOURCE_ROW: pa.array([row.row for row in of_file], pa.int64()),
            schema.KEY: pa.array([row.key for row in of_file], key_type),
        }
        for modality in modalities:
            contents = [as_blob(getattr(row, modality)) for row in of_file]
            columns[modality] = pa.array(contents, schema.FINGERPRINT_TYPE)
        ledger.add_catalog_rows(pa.table(columns), trusted=file in set(trusted))
    for file in stored:
        table = pa.table(
            {
                schema.KEY: pa.array([key for key, _ in file.rows], key_type),
                schema.FINGERPRINT: pa.array(
                    [as_blob(content) for _, content in file.rows], schema.FINGERPRINT_TYPE
                ),
            }
        )
        if file.kind == "rejects":
            table = table.append_column(schema.REASON, pa.repeat(file.reason, len(file.rows)))
        retried = np.array([key in file.retried for key, _ in file.rows], dtype=np.bool_)
        ledger.add_stored_rows(table, file=stored_file(file), staged=file.staged, retried=retried)
    ledger.settle()
    return ledger


def stored_file(file: Stored) -> StoredFile:
    return StoredFile(
        path=file.path,
        kind=file.kind,
        modality=file.modality,
        num_rows=len(file.rows),
        num_bytes=1,
    )


def due(ledger: Ledger) -> dict[tuple[str, int], set[str]]:
    """(file, row) -> what is due of it."""
    found = {}
    for file in ledger.due():
        assert file.rows.tolist() == sorted(file.rows.tolist())
        for index, row in enumerate(file.rows.tolist()):
            found[file.path, row] = {
                name for name, flags in file.wanted.items() if flags[index].item()
            }
    return found


def live(ledger: Ledger, stored: Iterable[Stored]) -> dict[str, list[int]]:
    """Path -> positions of live rows; paths without any are left out."""
    paths = [file.path for file in stored]
    found = dict(zip(paths, ledger.live_positions(paths), strict=True))
    positions = {path: rows.tolist() for path, rows in found.items()}
    positions = {path: rows for path, rows in positions.items() if rows}
    assert ledger.num_live_by_path() == {path: len(rows) for path, rows in positions.items()}
    return positions


def copies(ledger: Ledger, *, max_rows: int = 1000) -> dict[tuple[Key, str], tuple[str, int]]:
    """(key, modality) -> path and position of the embedding to be copied."""
    found = {}
    for table in ledger.copies(max_rows=max_rows):
        assert 0 < table.num_rows <= max_rows
        assert len(set(table["modality"].to_pylist())) == 1
        for row in table.to_pylist():
            assert (row["key"], row["modality"]) not in found
            found[row["key"], row["modality"]] = (row["path"], row["position"])
    return found


def counted(ledger: Ledger, modality: Modality = "image") -> dict[str, int]:
    """What is not 0 of the counts of a modality, without `num_`."""
    counts = dataclasses.asdict(ledger.counts().keys[modality])
    return {name.removeprefix("num_"): num for name, num in counts.items() if num}


def rejects(ledger: Ledger, key_type: pa.DataType | None = None) -> list[tuple[Any, ...]]:
    key_type = key_type or pa.string()
    table = ledger.whole_row_rejects(key_type=key_type)
    assert table.schema == schema.rejects_schema(key_type=key_type)
    assert set(table["stage"].to_pylist()) <= {"plan"}
    assert table["modality"].null_count == table["fingerprint"].null_count == table.num_rows
    columns = ("key", "reason", "detail", "source_file", "source_row")
    return list(zip(*(table[name].to_pylist() for name in columns), strict=True))


A, B = Row("a", 0, "k0", "x"), Row("a", 1, "k1", "y")


def test_at_first_every_row_is_due():
    with settled([A, B, Row("b", 0, "k2", "z")]) as ledger:
        assert due(ledger) == {("a", 0): {"image"}, ("a", 1): {"image"}, ("b", 0): {"image"}}
        counts = ledger.counts()
        assert (counts.num_rows, counts.num_keys, counts.num_due_rows) == (3, 3, 3)
        assert counts.num_due == {"image": 3}
        assert counted(ledger) == {"new": 3}
        assert rejects(ledger) == []


def test_an_empty_catalog_has_nothing_due():
    with settled([]) as ledger:
        assert ledger.due() == []
        assert ledger.num_live_by_path() == {}
        assert ledger.whole_row_rejects(key_type=pa.string()).num_rows == 0


def test_an_unchanged_row_is_live_and_a_changed_one_due():
    stored = [Stored("s", "image", [("k0", "x"), ("k1", "before")])]
    with settled([A, B], stored) as ledger:
        assert due(ledger) == {("a", 1): {"image"}}
        assert live(ledger, stored) == {"s": [0]}
        assert counted(ledger) == {"changed": 1, "unchanged": 1}


def test_a_row_that_moved_is_live_still():
    stored = [Stored("s", "image", [("k0", "x")])]
    with settled([Row("other", 9, "k0", "x")], stored) as ledger:
        assert due(ledger) == {}
        assert live(ledger, stored) == {"s": [0]}


def test_a_row_that_is_gone_is_dead():
    stored = [Stored("s", "image", [("gone", "x"), ("k0", "x")]), Stored("t", "image", [("g", "")])]
    with settled([A], stored) as ledger:
        assert live(ledger, stored) == {"s": [1]}
        assert due(ledger) == {}
        assert counted(ledger) == {"unchanged": 1, "deleted": 2}


def test_a_row_without_content_is_done_once_it_is_stored_so():
    stored = [Stored("s", "image", [("k0", None), ("k1", None)])]
    with settled([Row("a", 0, "k0", None), B], stored) as ledger:
        assert live(ledger, stored) == {"s": [0]}
        assert due(ledger) == {("a", 1): {"image"}}


def test_of_a_trusted_file_the_key_alone_tells():
    stored = [Stored("s", "image", [("k0", "x"), ("k2", "z")])]
    rows = [Row("a", 0, "k0", None), Row("b", 0, "k2", None), Row("a", 1, "new", None)]
    with settled(rows, stored, trusted=["a"]) as ledger:
        assert live(ledger, stored) == {"s": [0]}
        assert due(ledger) == {("b", 0): {"image"}, ("a", 1): {"image"}}


def test_what_was_staged_for_this_catalog_need_not_be_compared():
    stored = [Stored("s", "image", [("k0", "whatever")], staged=True)]
    with settled([A, B], stored) as ledger:
        assert live(ledger, stored) == {"s": [0]}
        assert due(ledger) == {("a", 1): {"image"}}


def test_of_rows_stored_twice_one_is_live_and_the_committed_one_goes_first():
    stored = [
        Stored("a-staged", "image", [("k0", "x"), ("k1", "y")], staged=True),
        Stored("b-staged", "image", [("k0", "x"), ("k1", "y")], staged=True),
        Stored("z-committed", "image", [("k0", "x")]),
    ]
    with settled([A, B], stored) as ledger:
        assert live(ledger, stored) == {"z-committed": [0], "a-staged": [1]}
        assert counted(ledger) == {"unchanged": 1, "staged": 1}


def test_modalities_are_due_apart():
    rows = [Row("a", 0, "k0", "x", "t"), Row("a", 1, "k1", "y", "u"), Row("a", 2, "k2", "z", "v")]
    stored = [
        Stored("i", "image", [("k0", "x"), ("k1", "y")]),
        Stored("t", "text", [("k0", "t"), ("k1", "changed"), ("k2", "v")]),
    ]
    with settled(rows, stored, modalities=MODALITIES) as ledger:
        assert due(ledger) == {("a", 1): {"text"}, ("a", 2): {"image"}}
        assert live(ledger, stored) == {"i": [0, 1], "t": [0, 2]}
        counts = ledger.counts()
        assert counts.num_due == {"image": 1, "text": 1}
        assert counted(ledger) == {"new": 1, "unchanged": 2}
        assert counted(ledger, "text") == {"changed": 1, "unchanged": 2}
        assert counts.num_due_rows == 2


def test_rows_without_a_key_or_with_a_taken_one_are_rejected_whole():
    rows = [
        Row("b", 0, "k0", "x"),
        Row("b", 1, None, "x"),
        Row("a", 7, "k0", "x"),
        Row("a", 9, "k0", "y"),
        Row("a", 3, "k1", "x"),
    ]
    with settled(rows) as ledger:
        assert due(ledger) == {("a", 7): {"image"}, ("a", 3): {"image"}}
        assert rejects(ledger) == [
            ("k0", "duplicate_key", "first in a row 7", "a", 9),
            ("k0", "duplicate_key", "first in a row 7", "b", 0),
            (None, "null_key", None, "b", 1),
        ]
        counts = ledger.counts()
        assert (counts.num_rows, counts.num_keys) == (5, 2)


def test_the_row_that_counts_decides_what_has_changed():
    rows = [Row("a", 0, "k0", "first"), Row("b", 0, "k0", "second")]
    stored = [Stored("s", "image", [("k0", "second")])]
    with settled(rows, stored) as ledger:
        assert due(ledger) == {("a", 0): {"image"}}
        assert live(ledger, stored) == {}


@pytest.mark.parametrize("keys", [[0, -1, 2**63 - 1, -(2**63)], ["", " ", "'", "ä", "\U0001f600"]])
def test_keys_of_either_type_are_told_apart(keys):
    key_type = pa.array(keys).type
    rows = [Row("a", row, key, "x") for row, key in enumerate([*keys, keys[0], None])]
    stored = [Stored("s", "image", [(keys[1], "x")])]
    with settled(rows, stored, key_type=key_type) as ledger:
        assert set(due(ledger)) == {("a", row) for row in range(len(keys)) if row != 1}
        assert [reject[:2] for reject in rejects(ledger, key_type)] == [
            (keys[0], "duplicate_key"),
            (None, "null_key"),
        ]


def test_settling_again_counts_what_was_added_since():
    with settled([A, B]) as ledger:
        file = Stored("s", "image", [("k0", "x")], staged=True)
        rows = pa.table(
            {
                schema.KEY: ["k0"],
                schema.FINGERPRINT: pa.array([as_blob("x")], schema.FINGERPRINT_TYPE),
            }
        )
        ledger.add_stored_rows(rows, file=stored_file(file), staged=True)
        assert ledger.counts().num_due == {"image": 2}
        ledger.settle()
        assert due(ledger) == {("a", 1): {"image"}}


def test_settling_again_does_not_sort_the_catalog_again_unless_it_grew():
    def table() -> int:
        (row,) = ledger._db.sql(
            "SELECT table_oid FROM duckdb_tables() WHERE table_name = 'item'"
        ).fetchall()
        return int(row[0])

    with settled([A, B]) as ledger:
        before = table()
        ledger.settle()
        assert table() == before
        rows = {schema.SOURCE_FILE: ["b"], schema.SOURCE_ROW: [0], schema.KEY: ["k2"]}
        image = pa.array([as_blob("z")], schema.FINGERPRINT_TYPE)
        ledger.add_catalog_rows(pa.table({**rows, "image": image}), trusted=False)
        ledger.settle()
        assert due(ledger) == {("a", 0): {"image"}, ("a", 1): {"image"}, ("b", 0): {"image"}}


# Equal contents


def test_a_content_that_is_stored_under_another_key_is_copied_and_not_embedded():
    stored = [Stored("s", "image", [("other", "w"), ("gone", "x"), ("k2", "z")])]
    rows = [A, B, Row("a", 2, "k2", "z")]
    with settled(rows, stored, by_content=["image"]) as ledger:
        assert copies(ledger) == {("k0", "image"): ("s", 1)}
        assert due(ledger) == {("a", 1): {"image"}}
        assert live(ledger, stored) == {"s": [2]}
        assert counted(ledger) == {"new": 1, "moved": 1, "unchanged": 1, "deleted": 2}
        counts = ledger.counts()
        assert (counts.num_due, counts.num_encoded, counts.num_due_rows) == ({"image": 2}, 1, 1)
        assert ledger.num_waiting() == {"image": 0}
    with settled(rows, stored) as ledger:
        assert copies(ledger) == {}
        assert due(ledger) == {("a", 0): {"image"}, ("a", 1): {"image"}}


def test_contents_that_change_places_are_copied():
    stored = [Stored("s", "image", [("k0", "y"), ("k1", "x")])]
    with settled([A, B], stored, by_content=["image"]) as ledger:
        assert copies(ledger) == {("k0", "image"): ("s", 1), ("k1", "image"): ("s", 0)}
        assert due(ledger) == {}
        assert counted(ledger) == {"moved": 2}
        assert ledger.counts().num_due_rows == 0


def test_a_content_of_the_other_modality_is_another_content():
    stored = [Stored("i", "image", [("o", "x"), ("p", "u")]), Stored("t", "text", [("o", "t")])]
    rows = [Row("a", 0, "k0", "t", "x"), Row("a", 1, "k1", "x", "u")]
    with settled(rows, stored, modalities=MODALITIES, by_content=MODALITIES) as ledger:
        assert copies(ledger) == {("k1", "image"): ("i", 0)}
        assert due(ledger) == {("a", 0): {"image", "text"}, ("a", 1): {"text"}}


def test_of_rows_with_one_content_the_first_by_file_and_row_is_embedded():
    rows = [Row("b", 0, "k0", "x"), Row("a", 9, "k2", "x"), Row("a", 10, "k3", "x"), B]
    with settled(rows, by_content=["image"]) as ledger:
        assert due(ledger) == {("a", 9): {"image"}, ("a", 1): {"image"}}
        assert copies(ledger) == {}
        assert counted(ledger) == {"new": 4, "twins": 2}
        assert ledger.counts().num_encoded == ledger.counts().num_due_rows == 2
        assert (ledger.num_due(), ledger.num_waiting()) == ({"image": 4}, {"image": 2})


def test_twins_of_an_embedded_row_are_copied_and_those_of_a_rejected_one_tried():
    rows = [Row("a", row, f"k{row}", "x" if row < 3 else "bad") for row in range(6)]
    stored = [
        Stored("s", "image", [("k0", "x")], staged=True),
        Stored("r", "image", [("k3", "bad")], staged=True, kind="rejects"),
    ]
    with settled(rows, stored, by_content=["image"]) as ledger:
        assert copies(ledger) == {("k1", "image"): ("s", 0), ("k2", "image"): ("s", 0)}
        assert due(ledger) == {("a", 4): {"image"}, ("a", 5): {"image"}}
        assert ledger.num_waiting() == {"image": 0}
        assert counted(ledger) == {"new": 2, "moved": 2, "staged": 2}


def test_the_committed_one_of_several_is_copied_and_a_reject_never():
    stored = [
        Stored("a", "image", [("o", "x")], kind="rejects"),
        Stored("b", "image", [("p", "x")], staged=True),
        Stored("c", "image", [("q", "w"), ("r", "x"), ("s", "x")]),
    ]
    with settled([A], stored, by_content=["image"]) as ledger:
        assert copies(ledger) == {("k0", "image"): ("c", 1)}


def test_rows_without_a_fingerprint_are_no_twins_and_not_copied():
    rows = [Row("a", row, f"k{row}") for row in range(3)]
    stored = [Stored("s", "image", [("other", None), ("another", "x")])]
    for trusted in ([], ["a"]):
        with settled(rows, stored, trusted=trusted, by_content=["image"]) as ledger:
            assert len(due(ledger)) == 3
            assert copies(ledger) == {}


def test_what_a_trusted_row_has_stored_is_copied_for_others():
    stored = [Stored("s", "image", [("k0", "x")])]
    rows = [Row("a", 0, "k0", None), Row("b", 0, "k1", "x")]
    with settled(rows, stored, trusted=["a"], by_content=["image"]) as ledger:
        assert copies(ledger) == {("k1", "image"): ("s", 0)}
        assert counted(ledger) == {"unchanged": 1, "moved": 1}


def test_rejects_that_are_tried_again_are_due():
    of_keys = [("k0", "x"), ("k1", "old"), ("k2", "z")]
    rejected = Stored("r", "image", of_keys, kind="rejects", retried=["k0", "k1"])
    rows = [A, B, Row("a", 2, "k2", "z"), Row("a", 3, "k3", "x")]
    with settled(rows, [rejected], by_content=["image"]) as ledger:
        # The content of k0 and k3 may be embedded this time.
        assert due(ledger) == {("a", 0): {"image"}, ("a", 1): {"image"}}
        assert live(ledger, [rejected]) == {"r": [2]}
        assert counted(ledger) == {
            "new": 1,
            "changed": 1,
            "retried": 1,
            "unchanged": 1,
            "twins": 1,
        }


@pytest.mark.parametrize(
    ("kind", "reason", "expected"),
    [
        ("rejects", "fetch_failed", {"old": [0]}),
        ("rejects", "not_an_image", {"now": [0]}),
        ("embeddings", "", {"now": [0]}),
    ],
)
def test_a_reject_stays_if_another_try_gives_the_same_reason(kind, reason, expected):
    old = Stored("old", "image", [("k0", "x")], kind="rejects", retried=["k0"])
    old = dataclasses.replace(old, reason="fetch_failed")
    now = Stored("now", "image", [("k0", "x")], kind=kind, staged=True, reason=reason)
    with settled([A], [old], by_content=["image"]) as ledger:
        assert due(ledger) == {("a", 0): {"image"}}
        assert ledger.num_rejected() == 0
    with settled([A], [old, now], by_content=["image"]) as ledger:
        assert due(ledger) == {}
        assert live(ledger, [old, now]) == expected
        assert ledger.num_rejected() == (reason == "not_an_image")


def test_what_a_run_that_did_not_finish_healed_is_kept_though_nothing_is_tried_again_now():
    old = Stored("old", "image", [("k0", "x"), ("k1", "y")], kind="rejects")
    stored = [
        old,
        Stored("healed", "image", [("k0", "x")], staged=True),
        Stored("again", "image", [("k1", "y")], staged=True, kind="rejects"),
    ]
    with settled([A, B], stored, by_content=["image"]) as ledger:
        assert due(ledger) == {}
        assert live(ledger, stored) == {"healed": [0], "old": [1]}
        assert counted(ledger) == {"unchanged": 1, "staged": 1}


def test_a_staged_reject_that_is_tried_again_was_never_let_pass():
    staged = Stored("s", "image", [("k0", "x")], kind="rejects", retried=["k0"], staged=True)
    with settled([A], [staged]) as ledger:
        assert counted(ledger) == {"new": 1}


def test_copies_come_in_tables_of_bounded_size_in_the_order_of_files():
    stored = [
        Stored(f"s{file}", "image", [(f"o{file}-{row}", f"{file}-{row}") for row in range(4)])
        for file in range(3)
    ]
    rows = [
        Row("a", number, f"k{number}", f"{number % 3}-{number // 3 % 4}") for number in range(24)
    ]
    with settled(rows, stored, by_content=["image"]) as ledger:
        places = list(copies(ledger, max_rows=5).values())
        assert places == sorted(places)
        assert len(places) == 24


def test_due_rows_come_file_by_file_however_they_are_read(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pipelines.ledger.ROWS_PER_BATCH", 3)
    rows = [Row(file, row, f"{file}{row}", "x") for file in "cab" for row in range(7)]
    stored = [Stored("s", "image", [("a3", "x"), ("b6", "x")])]
    with settled(rows, stored) as ledger:
        found = {file.path: file.rows.tolist() for file in ledger.due()}
        assert found == {"a": [0, 1, 2, 4, 5, 6], "b": [*range(6)], "c": [*range(7)]}
        assert list(found) == ["a", "b", "c"]
        assert len(due(ledger)) == 19


def test_live_positions_come_in_the_order_asked_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pipelines.ledger.ROWS_PER_BATCH", 3)
    stored = [
        Stored(f"s{file}", "image", [(f"{file}-{row}", "x") for row in range(8)])
        for file in range(4)
    ]
    rows = [Row("a", row, f"{row % 3}-{row // 3}", "x") for row in range(3 * 6)]
    with settled(rows, stored) as ledger:
        paths = ["s2", "s3", "s0"]
        found = [positions.tolist() for positions in ledger.live_positions(paths)]
        assert found == [[*range(6)], [], [*range(6)]]
        assert list(ledger.live_positions([])) == []


KEYS = st.sampled_from(["k0", "k1", "k2", "k3", None])
CONTENTS = st.sampled_from(["x", "y", None])


@st.composite
def catalogs(draw: st.DrawFn) -> list[Row]:
    return [
        Row(file, row, *draw(st.tuples(KEYS, CONTENTS, CONTENTS)))
        for file in draw(st.sets(st.sampled_from("abc")))
        for row in range(draw(st.integers(0, 4)))
    ]


@st.composite
def stores(draw: st.DrawFn) -> list[Stored]:
    num_files = draw(st.integers(0, 4))
    keys = st.sampled_from(["k0", "k1", "k2", "k3", "gone"])
    return [
        Stored(
            f"s{draw(st.integers(0, 99)):02}-{number}",
            draw(st.sampled_from(MODALITIES)),
            draw(st.lists(st.tuples(keys, CONTENTS), min_size=1, max_size=4)),
            staged=draw(st.booleans()),
            reason=draw(st.sampled_from(["not_an_image", "fetch_failed"])),
            **draw(
                st.sampled_from(
                    [{}, {"kind": "rejects"}, {"kind": "rejects", "retried": ("k0", "k1", "gone")}]
                )
            ),
        )
        for number in range(num_files)
    ]


@given(
    rows=catalogs(),
    stored=stores(),
    trusted=st.sets(st.sampled_from("abc")),
    by_content=st.sets(st.sampled_from(MODALITIES)),
)
@settings(max_examples=40, deadline=None)
def test_agrees_with_a_model_in_plain_python(rows, stored, trusted, by_content):
    def is_due_again(file: Stored, key: Key) -> bool:
        """If it is to be tried again, and was not rejected for the same reason meanwhile."""
        return key in file.retried and not any(
            (other.kind, other.modality, other.reason) == ("rejects", file.modality, file.reason)
            and other.staged
            and key not in other.retried
            and any(key == of for of, _ in other.rows)
            for other in stored
        )

    first: dict[Key, Row] = {}
    expected_rejects = []
    for row in sorted(rows, key=lambda row: (row.file, row.row)):
        if row.key is None:
            expected_rejects.append((None, "null_key", row.file, row.row))
        elif row.key in first:
            expected_rejects.append((row.key, "duplicate_key", row.file, row.row))
        else:
            first[row.key] = row
    expected_live = defaultdict(list)
    expected_due = defaultdict(set)
    expected_copies = {}
    seen = set()
    expected = {modality: defaultdict(int) for modality in MODALITIES}
    for key, row in sorted(first.items(), key=lambda entry: (entry[1].file, entry[1].row)):
        for modality in MODALITIES:
            of_key = [
                (file, content)
                for file in stored
                for stored_key, content in file.rows
                if file.modality == modality and stored_key == key
            ]
            found = [
                (file.kind != "embeddings", file.staged, file.path, position)
                for file in stored
                for position, (stored_key, content) in enumerate(file.rows)
                if file.modality == modality
                and stored_key == key
                and not is_due_again(file, key)
                and (file.staged or row.file in trusted or content == getattr(row, modality))
            ]
            if found:
                _, is_staged, path, position = min(found)
                expected_live[path].append(position)
                expected[modality]["staged" if is_staged else "unchanged"] += 1
                continue
            # As in the catalog's table: a content of None is null there, trusted or not.
            content = getattr(row, modality)
            same = [
                (file.kind != "embeddings", file.staged, file.path, position)
                for file in stored
                for position, (stored_key, stored_content) in enumerate(file.rows)
                if file.modality == modality
                and modality in by_content
                and stored_content == content is not None
                and not is_due_again(file, stored_key)
            ]
            if same and not min(same)[0]:
                expected_copies[key, modality] = min(same)[2:]
                expected[modality]["moved"] += 1
                continue
            is_retried = any(
                is_due_again(file, key)
                and not file.staged
                and (row.file in trusted or of == content)
                for file, of in of_key
            )
            is_changed = any(not file.staged for file, _ in of_key)
            state = "retried" if is_retried else "changed" if is_changed else "new"
            expected[modality][state] += 1
            if modality in by_content and content is not None and not same:
                if (modality, content) in seen:
                    expected[modality]["twins"] += 1
                    continue
                seen.add((modality, content))
            expected_due[row.file, row.row].add(modality)
    for modality in MODALITIES:
        committed = {
            key
            for file in stored
            for key, _ in file.rows
            if file.modality == modality and not file.staged
        }
        expected[modality]["deleted"] = len(committed - set(first))

    with settled(
        rows, stored, trusted=trusted, modalities=MODALITIES, by_content=sorted(by_content)
    ) as ledger:
        assert due(ledger) == expected_due
        assert live(ledger, stored) == {path: sorted(of) for path, of in expected_live.items()}
        assert [(key, reason, file, row) for key, reason, _, file, row in rejects(ledger)] == (
            expected_rejects
        )
        counts = ledger.counts()
        assert (counts.num_rows, counts.num_keys) == (len(rows), len(first))
        assert counts.num_due_rows == len(expected_due)
        assert counts.num_encoded == sum(map(len, expected_due.values()))
        assert copies(ledger) == expected_copies
        for modality, numbers in expected.items():
            assert counted(ledger, modality) == {name: num for name, num in numbers.items() if num}
            keys = counts.keys[modality]
            in_all = keys.num_due + keys.num_unchanged + keys.num_staged
            assert in_all == counts.num_keys == len(first)
            assert ledger.num_due()[modality] == keys.num_due
            assert ledger.num_waiting()[modality] == keys.num_twins
