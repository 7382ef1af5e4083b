"""Tests of pipelines/ledger.py, case by case and against a model of it in plain Python."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import schema
from pipelines.ledger import Ledger
from pipelines.schema import MODALITIES, Modality
from pipelines.snapshots import StoredFile
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


def as_blob(content: str | None) -> bytes | None:
    return None if content is None else fingerprint(content)


def settled(
    rows: Iterable[Row],
    stored: Iterable[Stored] = (),
    *,
    trusted: Iterable[str] = (),
    modalities: Sequence[Modality] = ("image",),
    key_type: pa.DataType | None = None,
) -> Ledger:
    """A ledger of these rows; files named in `trusted` are added as such."""
    key_type = key_type or pa.string()
    ledger = Ledger(key_type=key_type, modalities=modalities)
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
        ledger.add_stored_rows(table, file=stored_file(file), staged=file.staged)
    ledger.settle()
    return ledger


def stored_file(file: Stored) -> StoredFile:
    return StoredFile(
        path=file.path,
        kind="embeddings",
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
    positions = {file.path: ledger.live_positions(file.path).tolist() for file in stored}
    positions = {path: rows for path, rows in positions.items() if rows}
    assert ledger.num_live_by_path() == {path: len(rows) for path, rows in positions.items()}
    return positions


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
        assert counts.num_live == {"image": 0}
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
        assert ledger.counts().num_live == {"image": 1}


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
        assert ledger.counts().num_live == {"image": 2}


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
        assert counts.num_live == {"image": 2, "text": 2}
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


def test_temporary_files_are_gone_at_the_end():
    with settled([A]) as ledger:
        folder = Path(ledger._spill_dir.name)
        assert folder.is_dir()
    assert not folder.exists()


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
        )
        for number in range(num_files)
    ]


@given(rows=catalogs(), stored=stores(), trusted=st.sets(st.sampled_from("abc")))
@settings(max_examples=40, deadline=None)
def test_agrees_with_a_model_in_plain_python(rows, stored, trusted):
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
    for key, row in first.items():
        for modality in MODALITIES:
            copies = [
                (file.staged, file.path, position)
                for file in stored
                for position, (stored_key, content) in enumerate(file.rows)
                if file.modality == modality
                and stored_key == key
                and (file.staged or row.file in trusted or content == getattr(row, modality))
            ]
            if copies:
                _, path, position = min(copies)
                expected_live[path].append(position)
            else:
                expected_due[row.file, row.row].add(modality)

    with settled(rows, stored, trusted=trusted, modalities=MODALITIES) as ledger:
        assert due(ledger) == expected_due
        assert live(ledger, stored) == {path: sorted(of) for path, of in expected_live.items()}
        assert [(key, reason, file, row) for key, reason, _, file, row in rejects(ledger)] == (
            expected_rejects
        )
        counts = ledger.counts()
        assert (counts.num_rows, counts.num_keys) == (len(rows), len(first))
        assert counts.num_due_rows == len(expected_due)
        assert sum(counts.num_due.values()) == sum(map(len, expected_due.values()))
        assert sum(counts.num_live.values()) == sum(map(len, expected_live.values()))
