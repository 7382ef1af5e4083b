"""Which files are merged: bounds over random nights, and that no row is merged too often."""

import itertools
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.catalog import CatalogConfig
from pipelines.compaction import FAN_IN, files_to_write, num_tiers
from pipelines.embedding import EmbedConfig, embed
from pipelines.engines import EngineChoice
from pipelines.snapshots import Kind, Snapshot, StoredFile, missing_files
from pipelines.store import Store
from pipelines.vacuum import Retention, vacuum
from tests.catalogs import stored_embeddings, write_rows
from tests.stages_here import use_stages_here

_names = itertools.count()


def stored(num_rows: int, *, kind: Kind = "embeddings") -> StoredFile:
    path = f"{kind}/{next(_names):06d}"
    return StoredFile(path=path, kind=kind, modality="text", num_rows=num_rows, num_bytes=num_rows)


def max_files(num_rows: int, *, rows_per_file: int) -> int:
    """Of a kind and modality: large ones have half of `rows_per_file`, and of small ones there are
    fewer than FAN_IN in each tier."""
    return 2 * num_rows // rows_per_file + (FAN_IN - 1) * num_tiers(rows_per_file)


class Files:
    """A store's files, and which rows are in which."""

    def __init__(self, rows_per_file: int) -> None:
        self.rows_per_file = rows_per_file
        self.rows: dict[StoredFile, list[int]] = {}
        self.num_merges: Counter[int] = Counter()
        """Row -> how often it was written anew with no dead row in its file."""
        self.num_falls: Counter[int] = Counter()
        """Row -> how often its file lost so many rows that it came into another tier."""

    def night(self, *, new: Sequence[int], dead: Iterable[int]) -> int:
        """Add rows, drop others, and compact; returns how many were written for compaction."""
        gone = set(dead)
        for first in range(0, len(new), self.rows_per_file):
            some = list(new[first : first + self.rows_per_file])
            self.rows[stored(len(some))] = some
        alive = {file: [row for row in rows if row not in gone] for file, rows in self.rows.items()}
        alive = {file: rows for file, rows in alive.items() if rows}
        lists = files_to_write(
            alive,
            num_live={file.path: len(rows) for file, rows in alive.items()},
            rows_per_file=self.rows_per_file,
        )
        num_written = 0
        for of_one in lists:
            for file in of_one:
                if len(alive[file]) == file.num_rows:
                    num_written += file.num_rows
                    self.num_merges.update(alive[file])
            rows = [row for file in of_one for row in alive.pop(file)]
            alive[stored(len(rows))] = rows
        self.rows = alive
        return num_written


def test_files_without_dead_rows_and_large_ones_stay():
    files = [stored(100), stored(50), *(stored(49) for _ in range(FAN_IN - 1))]
    num_live = {file.path: file.num_rows for file in files}
    assert files_to_write(files, num_live=num_live, rows_per_file=100) == []
    num_live[files[0].path] = 99
    assert files_to_write(files, num_live=num_live, rows_per_file=100) == [[files[0]]]


def test_a_full_tier_is_merged_up_to_the_rows_of_a_file():
    files = [stored(30) for _ in range(FAN_IN)]
    lists = files_to_write(files, num_live={file.path: 30 for file in files}, rows_per_file=100)
    assert [len(of_one) for of_one in lists] == [3, 3, 2]


def test_what_is_merged_may_fill_the_next_tier_and_is_written_once():
    files = [*(stored(8) for _ in range(FAN_IN - 1)), *(stored(1) for _ in range(FAN_IN))]
    num_live = {file.path: file.num_rows for file in files}
    (of_one,) = files_to_write(files, num_live=num_live, rows_per_file=1000)
    assert set(of_one) == set(files)


def test_kinds_and_modalities_are_not_mixed():
    files = [stored(1, kind=kind) for kind in ("embeddings", "rejects") for _ in range(FAN_IN)]
    lists = files_to_write(files, num_live={file.path: 1 for file in files}, rows_per_file=1000)
    assert [{file.kind for file in of_one} for of_one in lists] == [{"embeddings"}, {"rejects"}]


def test_of_the_same_files_the_same_are_merged_whatever_their_order():
    rng = random.Random(0)
    files = [stored(rng.randrange(1, 90)) for _ in range(60)]
    num_live = {file.path: file.num_rows for file in files}

    def chosen(files: Sequence[StoredFile]) -> list[list[StoredFile]]:
        return files_to_write(files, num_live=num_live, rows_per_file=100)

    assert chosen(files) == chosen(files[::-1]) != []


@pytest.mark.parametrize(
    ("rows_per_file", "tiers"), [(1, 0), (2, 0), (3, 1), (4096, 4), (65536, 5)]
)
def test_tiers_are_few(rows_per_file: int, tiers: int):
    assert num_tiers(rows_per_file) == tiers


@given(
    rows_per_file=st.sampled_from([1, 2, 3, 10, 64, 500]),
    seed=st.integers(0, 2**32 - 1),
    num_nights=st.integers(1, 60),
    num_first=st.integers(0, 2000),
    num_new=st.integers(0, 40),
    num_dead=st.integers(0, 40),
)
@settings(max_examples=60)
def test_over_random_nights_no_row_is_lost_and_files_stay_few(
    rows_per_file: int, seed: int, num_nights: int, num_first: int, num_new: int, num_dead: int
):
    rng = random.Random(seed)
    names = itertools.count()
    files = Files(rows_per_file)
    alive = {next(names) for _ in range(num_first)}
    files.night(new=sorted(alive), dead=())
    for _ in range(num_nights):
        dead = rng.sample(sorted(alive), min(len(alive), rng.randint(0, num_dead)))
        new = [next(names) for _ in range(rng.randint(0, num_new))]
        files.night(new=new, dead=dead)
        alive = alive.difference(dead).union(new)
        found = [row for rows in files.rows.values() for row in rows]
        assert sorted(found) == sorted(alive)
        assert all(file.num_rows == len(rows) for file, rows in files.rows.items())
        assert len(files.rows) <= max_files(len(alive), rows_per_file=rows_per_file)
        assert all(file.num_rows <= rows_per_file for file in files.rows)


@given(
    rows_per_file=st.sampled_from([3, 10, 64, 500]),
    nights=st.lists(st.integers(0, 300), min_size=1, max_size=80),
)
@settings(max_examples=60)
def test_where_no_row_goes_each_is_merged_at_most_once_for_each_tier(
    rows_per_file: int, nights: list[int]
):
    files, names = Files(rows_per_file), itertools.count()
    for num_new in nights:
        files.night(new=[next(names) for _ in range(num_new)], dead=())
    assert max(files.num_merges.values(), default=0) <= num_tiers(rows_per_file)


def test_a_year_of_nights_of_one_percent_merges_each_new_row_about_once():
    """1,000 rows a file; 20,000 rows, of which the oldest 1 % go each night, and as many come."""
    files = Files(1000)
    files.night(new=range(20_000), dead=())
    num_written, most = [], 0
    for night in range(365):
        first = 20_000 + 200 * night
        dead = range(200 * night, 200 * (night + 1))
        num_written.append(files.night(new=range(first, first + 200), dead=dead))
        most = max(most, len(files.rows))
    assert most <= 35 < max_files(20_000, rows_per_file=1000)
    assert sum(num_written) <= 1.25 * 365 * 200
    assert max(num_written) <= 5000, "quiet nights are cheap, and so is the dearest"


def test_a_week_and_a_half_of_real_nights_and_a_kill(
    tmp_path: Path,
    checkpoint_dir: Path,
    engines_dir: Path,
    local_ray: None,
    monkeypatch: pytest.MonkeyPatch,
):
    """One new text a night: the night that fills a tier merges it, also if it is killed first."""
    use_stages_here(monkeypatch)
    rows = [{"key": f"k{number:02}", "text": f"text {number}"} for number in range(FAN_IN + 2)]
    config = EmbedConfig(
        catalog=CatalogConfig(uri=str(tmp_path / "catalog")),
        store_uri=str(tmp_path / "store"),
        engine=EngineChoice(checkpoint=str(checkpoint_dir), engines_uri=str(engines_dir)),
    )

    def night(num_rows: int) -> Snapshot:
        write_rows(tmp_path / "catalog", rows[:num_rows])
        return embed(config).snapshot

    def found() -> dict[str, bytes]:
        vectors = stored_embeddings(tmp_path / "store", modality="text")
        return {key: vector.tobytes() for key, vector in vectors.items()}

    before = [night(num_rows) for num_rows in range(1, FAN_IN)][-1]
    assert len(before.files) == FAN_IN - 1
    rows_before = found()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pipelines.committing.commit", killed)
        with pytest.raises(KeyboardInterrupt):
            night(FAN_IN)
    assert found() == rows_before
    after = embed(config)
    assert after.num_embedded == {"text": 0}
    assert [file.num_rows for file in after.snapshot.files] == [FAN_IN]
    assert found().items() >= rows_before.items()
    assert len(found()) == FAN_IN
    assert not embed(config).committed

    last = night(FAN_IN + 2)
    assert sorted(file.num_rows for file in last.files) == [2, FAN_IN]
    store = Store(config.store_uri)
    # The earlier states are whole as long as they are kept.
    assert missing_files(store, before.files) == []
    vacuum(store, Retention(num_snapshots=1, min_age_hours=0))
    assert missing_files(store, last.files) == []
    assert len(list((tmp_path / "store").rglob("*.parquet"))) == 2
