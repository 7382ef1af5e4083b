"""Contents that are embedded once: what a real Ray has to do in a night, and what is stored.

Rows of a first night, in an empty store, are all embedded: nobody compares their contents.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipelines import rounds
from pipelines.catalog import CatalogConfig
from pipelines.cluster.resources import Resources
from pipelines.copying import copy_embeddings
from pipelines.decode import RowLimits
from pipelines.embedding import EmbedConfig, EmbedResult, embed
from pipelines.engines import EngineChoice
from pipelines.errors import IncompleteRunError, TooManyRejectsError
from pipelines.ledger import DueRows
from pipelines.schema import MODALITIES
from pipelines.snapshots import StoredFile
from pipelines.store import Store
from pipelines.writing import write_table
from tests import stages_here
from tests.catalogs import scene_rows, stored_rows, stored_snapshot, write_rows

Rows = Sequence[dict[str, Any]]


class Killed(BaseException):
    """In place of a signal: nothing handles it."""


class Nights:
    """A catalog and a store, and what each run gives."""

    def __init__(self, folder: Path, *, checkpoint_dir: Path, engines_dir: Path) -> None:
        self.catalog_dir, self.store_dir = folder / "catalog", folder / "store"
        # Of the last run: rows that the stages read, and contents of them that they took.
        self.seen = (0, 0)
        self._engine = EngineChoice(checkpoint=str(checkpoint_dir), engines_uri=str(engines_dir))

    def __call__(self, rows: Rows | None = None, *, num_files: int = 2, **options) -> EmbedResult:
        """Write the rows, if any are given, and embed."""
        if rows is not None:
            write_rows(self.catalog_dir, rows, num_files=num_files)
        columns = options.pop("columns", {})
        self.seen = (0, 0)
        return embed(
            EmbedConfig(
                catalog=CatalogConfig(uri=str(self.catalog_dir), **columns),
                store_uri=str(self.store_dir),
                engine=self._engine,
                limits=RowLimits(max_reject_share=1.0),
                resources=Resources(rows_per_file=options.pop("rows_per_file", 4096)),
                **options,
            )
        )

    def watched_stages(self, *args: Any, due: Sequence[DueRows], **options: Any) -> Any:
        """`run_stages`, and how much it has to do."""
        num_read, num_taken = self.seen
        num_read += sum(len(file.rows) for file in due)
        num_taken += sum(flags.sum().item() for file in due for flags in file.wanted.values())
        self.seen = num_read, num_taken
        return stages_here.run_stages(*args, due=due, **options)

    def bits(self) -> dict[tuple[str, Any], bytes]:
        """Modality and key -> the embedding's bytes; fails on one that is there twice."""
        found: dict[tuple[str, Any], bytes] = {}
        for row in stored_rows(self.store_dir):
            place = row["modality"], row["key"]
            assert place not in found
            found[place] = np.array(row["embedding"], dtype=np.float32).tobytes()
        return found

    def rejects(self) -> set[tuple[str, Any]]:
        """Modality and key; fails on one that is there twice."""
        rows = stored_rows(self.store_dir, kind="rejects")
        found = {(row["modality"], row["key"]) for row in rows}
        assert len(found) == len(rows)
        return found


@pytest.fixture
def nights(
    tmp_path: Path,
    checkpoint_dir: Path,
    engines_dir: Path,
    local_ray: None,
    monkeypatch: pytest.MonkeyPatch,
) -> Nights:
    stages_here.use_stages_here(monkeypatch)
    made = Nights(tmp_path, checkpoint_dir=checkpoint_dir, engines_dir=engines_dir)
    monkeypatch.setattr("pipelines.rounds.run_stages", made.watched_stages)
    return made


def test_stages_end_with_the_error_that_stops_their_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Though whoever holds the error, with its frames, holds what they yield, too."""
    ended = []

    def stages(*_: Any, **__: Any) -> Iterator[list[StoredFile]]:
        try:
            yield [
                StoredFile(path="a", kind="rejects", modality="image", num_rows=100, num_bytes=1)
            ]
            raise AssertionError("nobody asked for more")
        finally:
            ended.append(True)

    monkeypatch.setattr(rounds, "run_stages", stages)
    monkeypatch.setattr(rounds, "copy_embeddings", lambda *_, **__: [])
    monkeypatch.setattr(rounds, "_board", lambda _: None)
    pass_ = SimpleNamespace(
        resources=Resources(),
        limits=RowLimits(max_reject_share=0.0),
        store=Store(str(tmp_path)),
        plan_id="p",
    )
    ledger = SimpleNamespace(
        num_due=lambda: {"image": 100},
        num_waiting=lambda: {"image": 0},
        num_rejected=lambda: 0,
        due=lambda: ["all"],
    )
    counts = SimpleNamespace(keys={}, num_planned=100)
    with pytest.raises(TooManyRejectsError) as caught:
        rounds.write_due(pass_, ledger=ledger, counts=counts, on_progress=None)
    assert caught.value.__traceback__ is not None
    assert ended


def keyed(rows: Rows, key: Callable[[int], Any]) -> list[dict[str, Any]]:
    return [{**row, "key": key(number)} for number, row in enumerate(rows)]


@pytest.mark.parametrize("key", ["{}".format, lambda number: 2**40 + number])
def test_when_all_keys_are_renamed_nothing_is_encoded(nights: Nights, key):
    rows = keyed(scene_rows(40), key)
    nights(rows)
    before = nights.bits()
    renamed = keyed(rows, lambda number: key(1000 + number))
    night = nights(renamed[::-1], num_files=3, rows_per_file=16)
    assert night.progress is None
    assert night.num_embedded == {"image": 0, "text": 0}
    assert night.num_copied == {"image": 40, "text": 40}
    counts = night.counts.keys["image"]
    assert (counts.num_moved, counts.num_deleted, counts.num_new) == (40, 40, 0)
    after = nights.bits()
    assert after == {
        (modality, key(1000 + number)): before[modality, key(number)]
        for modality in MODALITIES
        for number in range(40)
    }
    # A row of an embedding that goes at the commit was copied, not taken away.
    assert all((nights.store_dir / file.path).exists() for file in night.snapshot.files)
    assert not nights().committed


def test_files_that_are_split_and_ordered_anew_are_not_even_copied(nights: Nights):
    rows = scene_rows(40)
    first = nights(rows)
    before = nights.bits()
    night = nights(sorted(rows, key=lambda row: row["text"]), num_files=5)
    assert nights.seen == (0, 0)
    assert night.num_copied == {"image": 0, "text": 0}
    assert night.counts.keys["text"].num_unchanged == 40
    assert night.snapshot.files == first.snapshot.files
    assert nights.bits() == before


def test_of_five_keys_with_one_content_one_is_encoded(nights: Nights):
    rows = scene_rows(5)
    nights(rows[:3])
    same = keyed([rows[4]] * 5, "twin-{}".format)
    night = nights([*rows[:3], *same], num_files=4)
    assert nights.seen == (1, 2)
    assert night.num_embedded == {"image": 1, "text": 1}
    assert night.num_copied == {"image": 4, "text": 4}
    counts = night.counts
    assert (counts.keys["image"].num_new, counts.keys["image"].num_twins) == (5, 4)
    assert (counts.num_due_rows, counts.num_encoded) == (1, 2)
    bits = nights.bits()
    for modality in MODALITIES:
        assert len({bits[modality, f"twin-{number}"] for number in range(5)}) == 1


def test_an_image_that_moved_and_a_text_that_is_new_are_told_apart(nights: Nights):
    rows = scene_rows(4)
    nights(rows)
    before = nights.bits()
    night = nights([*rows[1:], {**rows[0], "key": "new", "text": "another caption"}])
    assert nights.seen == (1, 1)
    assert night.num_embedded == {"image": 0, "text": 1}
    assert night.num_copied == {"image": 1, "text": 0}
    assert nights.bits()["image", "new"] == before["image", "k0000"]


def test_a_twin_of_a_reject_is_rejected_itself(nights: Nights):
    rows = scene_rows(3)
    nights(rows)
    bad = keyed([{**rows[0], "image": b"no image"}] * 3, "bad-{}".format)
    night = nights([*rows, *bad], num_files=3)
    # The first image, then its two twins; all texts are there.
    assert nights.seen == (3, 3)
    assert night.num_copied == {"image": 0, "text": 3}
    assert nights.rejects() == {("image", f"bad-{number}") for number in range(3)}
    details = {
        (row["key"], row["source_file"], row["source_row"])
        for row in stored_rows(nights.store_dir, kind="rejects")
    }
    files = [str(nights.catalog_dir / f"part-{number}.parquet") for number in (1, 2)]
    assert details == {("bad-0", files[0], 1), ("bad-1", files[1], 0), ("bad-2", files[1], 1)}
    # The next night knows that the content is no image: it tries both at once.
    more = keyed([bad[0]] * 2, "more-{}".format)
    nights([*rows, *bad, *more])
    assert nights.seen == (2, 2)
    assert len(nights.rejects()) == 5


def test_with_a_version_or_carried_columns_nothing_is_copied(nights: Nights):
    rows = [{**row, "v": "1", "price": 1.5} for row in scene_rows(3)]
    for columns in ({"version_column": "v"}, {"carry_columns": ("price",)}):
        nights.store_dir = nights.store_dir.with_name("-".join(columns))
        nights(rows, columns=columns)
        night = nights(keyed([*rows, rows[0]], "new-{}".format), columns=columns)
        assert night.num_embedded == {"image": 4, "text": 4}
        assert night.num_copied == {"image": 0, "text": 0}
        assert night.counts.keys["text"].num_new == 4


def test_killed_before_the_twins_are_copied_the_next_run_copies_them(
    nights: Nights, monkeypatch: pytest.MonkeyPatch
):
    rows = scene_rows(4)
    first = nights(rows[:3])
    calls: list[int] = []

    def killed_in_round_two(*args: Any, **options: Any) -> Iterator[StoredFile]:
        calls.append(1)
        if len(calls) == 2:
            raise Killed
        return copy_embeddings(*args, **options)

    wanted = [*rows[:3], *keyed([rows[3]] * 5, "twin-{}".format)]
    with monkeypatch.context() as patch:
        patch.setattr("pipelines.rounds.copy_embeddings", killed_in_round_two)
        with pytest.raises(Killed):
            nights(wanted)
    assert stored_snapshot(nights.store_dir) == first.snapshot
    night = nights()
    assert night.progress is None
    assert night.num_copied == {"image": 4, "text": 4}
    counts = night.counts.keys["image"]
    assert (counts.num_staged, counts.num_moved, counts.num_new) == (1, 4, 0)
    assert len(nights.bits()) == 16


def test_killed_between_two_copied_files_the_next_run_copies_the_rest(
    nights: Nights, monkeypatch: pytest.MonkeyPatch
):
    rows = scene_rows(40)
    nights(rows)
    before = nights.bits()
    written: list[StoredFile] = []

    def killed_at_the_fourth(*args: Any, **options: Any) -> StoredFile:
        if len(written) >= 3:
            raise Killed
        written.append(write_table(*args, **options))
        return written[-1]

    renamed = keyed(rows, "new-{}".format)
    with monkeypatch.context() as patch:
        patch.setattr("pipelines.copying.COPY_THREADS", 1)
        patch.setattr("pipelines.copying.write_table", killed_at_the_fourth)
        with pytest.raises(Killed):
            nights(renamed, rows_per_file=10)
    night = nights(rows_per_file=10)
    assert night.progress is None
    assert sum(night.num_copied.values()) == 80 - 30
    assert sum(keys.num_staged for keys in night.counts.keys.values()) == 30
    assert nights.bits() == {
        (modality, f"new-{number}"): before[modality, f"k{number:04d}"]
        for modality in MODALITIES
        for number in range(40)
    }


def test_rows_that_are_lost_between_stages_stop_the_run(
    nights: Nights, monkeypatch: pytest.MonkeyPatch
):
    rows = scene_rows(6)
    first = nights(rows[:3])

    def losing(*args: Any, **options: Any) -> Iterator[list[StoredFile]]:
        for files in stages_here.run_stages(*args, **options):
            yield [file for file in files if file.modality == "text"]

    with monkeypatch.context() as patch:
        patch.setattr("pipelines.rounds.run_stages", losing)
        with pytest.raises(IncompleteRunError, match=r"'image': 4, 'text': 1\} rows were planned"):
            nights([*rows, {**rows[5], "key": "twin"}])
    assert stored_snapshot(nights.store_dir) == first.snapshot


def test_twins_in_a_file_that_is_replaced_meanwhile_stop_the_run(
    nights: Nights, monkeypatch: pytest.MonkeyPatch
):
    rows = scene_rows(9)
    first = nights(rows[:3])
    num_rounds: list[int] = []

    def replaced(*args: Any, **options: Any) -> Iterator[list[StoredFile]]:
        num_rounds.append(1)
        write_rows(nights.catalog_dir, [*rows[:3], *keyed(rows[3:8], "twin-{}".format)])
        return stages_here.run_stages(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr("pipelines.rounds.run_stages", replaced)
        with pytest.raises(IncompleteRunError, match="the catalog changed while it was read"):
            nights([*rows[:3], *keyed([rows[8]] * 5, "twin-{}".format)], num_files=1)
    assert len(num_rounds) == 1
    assert stored_snapshot(nights.store_dir) == first.snapshot


def test_nights_at_random_agree_with_a_model(nights: Nights, monkeypatch: pytest.MonkeyPatch):
    random = np.random.default_rng(0)
    scenes = scene_rows(12)
    images = [None, b"no image", b"nor this", *(row["image"] for row in scenes)]
    texts = [None, "", " ", *(row["text"] for row in scenes)]
    contents = {"image": images, "text": texts}
    good = {modality: set(of[3:]) for modality, of in contents.items()}
    # Of the snapshot: modality and key -> content.
    parent: dict[tuple[str, Any], Any] = {}
    bits: dict[tuple[str, Any], bytes] = {}
    columns = pa.schema({"key": pa.int64(), "image": pa.binary(), "text": pa.string()})
    for number in range(4):
        keys = random.choice(30, size=18, replace=False)
        rows = [
            {
                "key": int(key),
                "image": images[random.integers(len(images))],
                "text": texts[random.integers(len(texts))],
            }
            for key in keys
        ]
        # Half of the keys that stay keep their contents.
        for row in rows:
            if ("image", row["key"]) in parent and random.random() < 0.5:
                row |= {modality: parent[modality, row["key"]] for modality in MODALITIES}
        write_rows(nights.catalog_dir, rows, num_files=int(random.integers(1, 5)), schema=columns)

        wanted = {(modality, row["key"]): row[modality] for modality in MODALITIES for row in rows}
        due = {
            place: content
            for place, content in wanted.items()
            if place not in parent or parent[place] != content
        }
        seen = {(place[0], content) for place, content in parent.items()}
        num_embedded, num_copied, num_tried = 0, 0, 0
        for (modality, _), content in due.items():
            if content not in good[modality]:
                num_tried += 1
            elif number and (modality, content) in seen:
                num_copied += 1
            else:
                seen.add((modality, content))
                num_embedded, num_tried = num_embedded + 1, num_tried + 1

        if number in (2, 4):
            # All is written of the first round and none of the second.
            with monkeypatch.context() as patch:
                patch.setattr("pipelines.rounds.add_stored", killed)
                with pytest.raises(Killed):
                    nights(rows_per_file=3)
            num_embedded = 0
        night = nights(rows_per_file=3)
        assert sum(night.num_embedded.values()) == num_embedded
        for keys in night.counts.keys.values():
            assert keys.num_due + keys.num_unchanged + keys.num_staged == len(rows)
            assert (keys.num_staged > 0) == (number in (2, 4))
        if number not in (2, 4):
            assert sum(night.num_copied.values()) == num_copied
            assert nights.seen[1] == num_tried

        after = nights.bits()
        assert set(after) == {place for place, of in wanted.items() if of in good[place[0]]}
        assert nights.rejects() == set(wanted) - set(after)
        vectors = defaultdict(set)
        for place, vector in bits.items():
            vectors[place[0], parent[place]].add(vector)
        for place, vector in after.items():
            of_content = vectors[place[0], wanted[place]]
            if place not in due:
                assert vector == bits[place]
            elif number:
                # The first of a content that nobody had is the one that its twins have.
                of_content |= set() if of_content else {vector}
                assert vector in of_content
        parent, bits = wanted, after


def killed(*_: Any, **__: Any) -> None:
    raise Killed
