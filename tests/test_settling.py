"""Tests of pipelines/settling.py: which rows are live, due, moved or twins, case by case."""

import dataclasses

import pyarrow as pa
import pytest

from pipelines import schema
from pipelines.schema import MODALITIES
from tests.ledgers import (
    Row,
    Stored,
    as_blob,
    copies,
    counted,
    due,
    live,
    rejects,
    settled,
    stored_file,
)

A, B = Row("a", 0, "k0", "x"), Row("a", 1, "k1", "y")


def test_at_first_every_row_is_due():
    with settled([A, B, Row("b", 0, "k2", "z")]) as ledger:
        assert due(ledger) == {("a", 0): {"image"}, ("a", 1): {"image"}, ("b", 0): {"image"}}
        counts = ledger.counts()
        assert (counts.num_rows, counts.num_keys, counts.num_due_rows) == (3, 3, 3)
        assert counts.num_due == {"image": 3}
        assert counted(ledger) == {"new": 3}
        assert rejects(ledger) == []


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


def test_the_row_that_counts_decides_what_has_changed():
    rows = [Row("a", 0, "k0", "first"), Row("b", 0, "k0", "second")]
    stored = [Stored("s", "image", [("k0", "second")])]
    with settled(rows, stored) as ledger:
        assert due(ledger) == {("a", 0): {"image"}}
        assert live(ledger, stored) == {}


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
