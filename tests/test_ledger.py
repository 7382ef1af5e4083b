"""Tests of pipelines/ledger.py, case by case and against a model of it in plain Python."""

from collections import defaultdict

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.schema import MODALITIES
from tests.ledgers import (
    Key,
    Row,
    Stored,
    copies,
    counted,
    due,
    live,
    rejects,
    settled,
)


def test_an_empty_catalog_has_nothing_due():
    with settled([]) as ledger:
        assert ledger.due() == []
        assert ledger.num_live_by_path() == {}
        assert ledger.whole_row_rejects(key_type=pa.string()).num_rows == 0


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
@settings(max_examples=40)
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
