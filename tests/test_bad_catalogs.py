"""Nights with bad input: the error names the thing, the value and the way out; the old state stays.

The catalog of the first night is good; each test delivers another one to the same store.
"""

import contextlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import nightly
from pipelines.snapshots import current_snapshot
from pipelines.store import Store
from tests.catalogs import scene_rows, stored_embeddings, stored_rows, write_rows
from tests.commands import Done, command
from tests.stages_here import use_stages_here

ROWS = [
    {"key": row["key"], "text": row["text"], "version": number, "price": number}
    for number, row in enumerate(scene_rows(12))
]


@dataclass(frozen=True)
class Shop:
    """A catalog, its store with one snapshot, and the night that brings the one up to the other."""

    catalog_dir: Path
    store_dir: Path
    model: tuple[str, ...]

    def night(self, *options: str) -> Done:
        words = ["--catalog", str(self.catalog_dir), "--store", str(self.store_dir), "--json"]
        return command(nightly.main, [*words, *self.model, *options])

    def deliver(self, *files: pa.Table) -> None:
        """Put these files in the place of what was in the catalog."""
        self.catalog_dir.mkdir(exist_ok=True)
        for stale in self.catalog_dir.iterdir():
            stale.unlink()
        for number, table in enumerate(files):
            pq.write_table(table, self.catalog_dir / f"part-{number}.parquet")

    def num_snapshots(self) -> int:
        return len(list((self.store_dir / "snapshots").iterdir()))


@pytest.fixture
def shop(
    tmp_path: Path,
    checkpoint_dir: Path,
    engines_dir: Path,
    local_ray: None,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Shop]:
    """Makes one, with its first night done by some options."""
    monkeypatch.setattr(nightly, "ray_cluster", lambda *_, **__: contextlib.nullcontext())
    use_stages_here(monkeypatch)
    model = ("--checkpoint", str(checkpoint_dir), "--engines", str(engines_dir))

    def make(*options: str, rows: Sequence[dict[str, Any]] = ROWS) -> Shop:
        made = Shop(tmp_path / "catalog", tmp_path / "store", model)
        made.deliver(pa.Table.from_pylist(list(rows)))
        done = made.night(*options)
        assert done.code == 0, done.err
        return made

    return make


TABLE = pa.Table.from_pylist(ROWS)


def with_column(name: str, column: pa.Array) -> pa.Table:
    return TABLE.set_column(TABLE.column_names.index(name), name, column)


REFUSED = {
    "keys that are integers now": (
        (),
        [with_column("key", pa.array(range(12)))],
        r"store \S+ holds keys of type string, the catalog's are int64\. They never mix: name "
        r"another --store, or mend the catalog",
    ),
    "keys of two types": (
        (),
        [TABLE, with_column("key", pa.array(range(12)))],
        r"key column 'key' differs between files: string in \S+part-0\.parquet, int64 in "
        r"\S+part-1\.parquet\ncolumns there: key \(int64\), key \(string\)",
    ),
    "no key column": (
        (),
        [TABLE.drop_columns(["key"])],
        r"key column 'key' is missing in \S+part-0\.parquet\ncolumns there: price \(int64\)",
    ),
    "no text column": (
        (),
        [TABLE.drop_columns(["text"])],
        "no column 'image' or 'text'; name yours with --image-column, --text-column",
    ),
    "a text column in some files only": (
        (),
        [TABLE, TABLE.drop_columns(["text"])],
        r"text column 'text' is missing in \S+part-1\.parquet",
    ),
    "images beside the texts": (
        (),
        [TABLE.append_column("image", pa.array([b"x"] * 12))],
        r"text of each key, the catalog has image and text \(--image-column none leaves the image "
        r"out\)\. They never mix",
    ),
    "no version column": (
        ("--version-column", "version"),
        [TABLE.drop_columns(["version"])],
        r"version column 'version' is missing in \S+part-0\.parquet",
    ),
    "a carried column of another type": (
        ("--carry", "price"),
        [with_column("price", pa.array([f"{row}.00" for row in range(12)]))],
        "carried column 'price' of type int64, in the catalog it is string. They never mix: name "
        "another --store, or mend the catalog",
    ),
    "a carried column that is gone": (
        ("--carry", "price"),
        [TABLE.drop_columns(["price"])],
        r"carried column 'price' is missing in \S+part-0\.parquet",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_catalog_with_other_columns_is_refused_and_the_old_state_stays(
    shop: Callable[..., Shop], case: str
):
    options, files, message = REFUSED[case]
    made = shop(*options)
    before = stored_rows(made.store_dir)
    made.deliver(*files)
    done = made.night(*options)
    assert (done.code, done.out) == (1, "")
    assert re.search(message, done.err), done.err
    assert made.num_snapshots() == 1
    assert stored_rows(made.store_dir) == before
    # The way out: once the catalog is mended, nothing is embedded anew.
    made.deliver(TABLE)
    mended = made.night(*options)
    assert mended.code == 0, mended.err
    assert mended.json["run"]["num_embedded"] == {"text": 0}


def test_images_beside_the_texts_are_left_out_as_the_message_says(shop: Callable[..., Shop]):
    made = shop()
    made.deliver(TABLE.append_column("image", pa.array([b"x"] * 12)))
    assert made.night("--image-column", "none").json["run"]["num_embedded"] == {"text": 0}


def test_a_column_that_nobody_asked_for_may_come_and_go(shop: Callable[..., Shop]):
    made = shop()
    made.deliver(TABLE.drop_columns(["price"]).append_column("size", pa.array(range(12))))
    assert made.night().json["run"]["num_embedded"] == {"text": 0}


def test_a_text_column_under_another_name_is_another_catalog_of_the_same(
    shop: Callable[..., Shop],
):
    made = shop()
    made.deliver(TABLE.rename_columns(["key", "caption", "version", "price"]))
    assert "no column 'image' or 'text'" in made.night().err
    done = made.night("--text-column", "caption")
    assert done.json["run"]["num_embedded"] == {"text": 0}, "the contents are the same"


def test_of_rows_with_one_key_the_first_by_file_and_row_counts(shop: Callable[..., Shop]):
    made = shop()
    before = stored_embeddings(made.store_dir, modality="text")
    again = [{**ROWS[0], "text": "in the second file"}, {**ROWS[3], "text": ROWS[4]["text"]}]
    made.deliver(
        pa.Table.from_pylist([*ROWS, {**ROWS[1], "text": "further down"}]),
        pa.Table.from_pylist([*again, {**ROWS[0], "key": "new"}]),
    )
    done = made.night()
    assert done.json["run"]["rejects_by_reason"] == {"duplicate_key": 3}
    after = stored_embeddings(made.store_dir, modality="text")
    assert set(after) == {*before, "new"}
    assert all((after[key] == before[key]).all() for key in before)
    first, second = (str(made.catalog_dir / f"part-{number}.parquet") for number in (0, 1))
    rejects = stored_rows(made.store_dir, kind="rejects")
    assert [(row["key"], row["source_file"], row["detail"]) for row in rejects] == [
        (ROWS[1]["key"], first, f"first in {first} row 1"),
        (ROWS[0]["key"], second, f"first in {first} row 0"),
        (ROWS[3]["key"], second, f"first in {first} row 3"),
    ]


def test_a_null_is_a_version_like_others_but_no_word(shop: Callable[..., Shop]):
    versions: list[Any] = [None, None, "None", "1", *["2"] * 8]
    rows = [{**row, "version": version} for row, version in zip(ROWS, versions, strict=True)]
    by_version = ("--version-column", "version")
    made = shop(*by_version, rows=rows)
    made.deliver(pa.Table.from_pylist(rows[::-1]))
    assert made.night(*by_version).json["run"]["num_embedded"] == {"text": 0}
    for number, version in ((1, "None"), (2, None), (3, None)):
        rows[number]["version"] = version
    made.deliver(pa.Table.from_pylist(rows))
    run = made.night(*by_version).json["run"]
    assert (run["num_embedded"], run["plan"]["text"]["num_changed"]) == ({"text": 3}, 3)


def test_versions_that_turn_to_floats_for_a_null_among_them_are_the_same(
    shop: Callable[..., Shop],
):
    """As pandas does with integers."""
    by_version = ("--version-column", "version")
    made = shop(*by_version)
    versions = pa.array([None, *(float(row) for row in range(1, 12))], pa.float64())
    made.deliver(with_column("version", versions))
    assert made.night(*by_version).json["run"]["num_embedded"] == {"text": 1}


def test_a_store_of_a_newer_format_is_left_alone(shop: Callable[..., Shop]):
    made = shop()
    path = made.store_dir / "snapshots" / "00000001.json"
    newer = {**json.loads(path.read_text()), "format_version": 2, "shards": []}
    path.write_text(json.dumps(newer))
    write_rows(made.catalog_dir, ROWS[:10])
    done = made.night()
    assert done.code == 1
    assert "00000001.json is of format 2, this Clipmill reads 1; upgrade Clipmill" in done.err
    assert json.loads(path.read_text()) == newer
    assert made.num_snapshots() == 1


@pytest.mark.parametrize("share", [0.0, 0.99])
def test_a_manifest_cut_short_is_named_and_without_it_the_one_before_is_current(
    shop: Callable[..., Shop], share: float
):
    made = shop()
    before = stored_embeddings(made.store_dir, modality="text")
    write_rows(made.catalog_dir, [{**ROWS[0], "text": "another"}, *ROWS[1:]])
    assert made.night().json["snapshot"] == 2
    path = made.store_dir / "snapshots" / "00000002.json"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    done = made.night()
    assert done.code == 1
    assert "00000002.json is damaged" in done.err
    assert "move it away, and the snapshot before it is current again" in done.err
    path.rename(made.store_dir / "00000002.json")
    current = current_snapshot(Store(str(made.store_dir)))
    assert current is not None
    assert current.number == 1
    found = stored_embeddings(made.store_dir, modality="text")
    assert all((found[key] == before[key]).all() for key in before)
    assert made.night().json["snapshot"] == 2
