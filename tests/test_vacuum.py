"""What a vacuum removes and what it must not, against a model; killed at any point, too."""

import dataclasses
import itertools
import os
import random
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.publishing.folders import Folder
from jobs.snapshots import main
from pipelines.errors import StoreError
from pipelines.indexes.manifest import find_index, index_dir
from pipelines.snapshots import (
    Snapshot,
    StoredFile,
    commit,
    current_snapshot,
    read_snapshot,
    rollback,
    snapshot_numbers,
)
from pipelines.store import Store
from pipelines.vacuum import Retention, find_garbage, vacuum
from tests.commands import command
from tests.object_store import s3_bucket
from tests.stored import embeddings_file, indexed, make_snapshot

ONE_NOW = Retention(num_snapshots=1, min_age_hours=0)


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3_bucket() as uri:
        yield uri


@pytest.fixture(params=["local", "memory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return Store(str(tmp_path / "store"))
    if request.param == "memory":
        return Store(f"memory://{tmp_path.name}/store")
    return Store(f"{request.getfixturevalue('bucket')}/{tmp_path.name}/store")


@pytest.fixture
def local(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


def write(store: Store, plan_id: str, *, seed: int = 0) -> StoredFile:
    vectors = {f"k{seed}-{row}": [1.0, seed, row, 0.0] for row in range(3)}
    return embeddings_file(store, vectors, plan_id=plan_id)


def write_rejects(store: Store, plan_id: str, *, name: str = "image-0") -> StoredFile:
    path = f"rejects/{plan_id}/{name}.parquet"
    store.publish(path, b"rejects")
    return StoredFile(path=path, kind="rejects", modality="image", num_rows=1, num_bytes=7)


def pass_hours(store: Store, hours: float, *, under: str = "") -> None:
    """All that is there becomes older, on a disk."""
    for path in Path(store.full_path(under)).rglob("*"):
        written = path.stat().st_mtime - hours * 3600
        os.utime(path, (written, written))


def paths(store: Store) -> set[str]:
    return {file.path for file in store.files("")}


def three_nights(store: Store) -> list[Snapshot]:
    """Snapshots that share a file each with the one before, all indexed."""
    files = [write(store, f"plan{number}", seed=number) for number in range(4)]
    rejects = [write_rejects(store, f"plan{number}") for number in range(4)]
    snapshots = [
        make_snapshot([*files[first : first + 2], rejects[first]], number=first + 1)
        for first in range(3)
    ]
    for snapshot in snapshots:
        indexed(store, snapshot)
        commit(store, snapshot)
    return snapshots


def all_of(store: Store, *snapshots: Snapshot) -> set[str]:
    """Paths of manifests, listed files and indexes."""
    needed: set[str] = set()
    for snapshot in snapshots:
        folder = index_dir(snapshot, modality="image")
        needed |= {snapshot.path, *(file.path for file in snapshot.files)}
        manifest = find_index(store, snapshot, modality="image")
        assert manifest is not None
        needed |= {
            f"{folder}/manifest.json",
            *(f"{manifest.folder}/{name}" for name in manifest.files),
        }
    return needed


@pytest.mark.parametrize("num_snapshots", [1, 2, 3, 100])
def test_what_the_last_snapshots_need_stays_and_nothing_else(store: Store, num_snapshots: int):
    snapshots = three_nights(store)
    store.publish("runs/run/report.json", b"{}")
    write(store, "staged")
    before = paths(store)
    retention = Retention(num_snapshots=num_snapshots, min_age_hours=0)
    found = find_garbage(store, retention)
    assert paths(store) == before
    assert vacuum(store, retention) == found
    left = paths(store)
    assert left == all_of(store, *snapshots[-num_snapshots:]) | {"runs/run/report.json"}
    assert found.snapshots == tuple(range(1, 4 - min(num_snapshots, 3)))
    assert sum(found.num_files.values()) == len(before) - len(left)
    assert find_garbage(store, retention).num_files == dict.fromkeys(found.num_files, 0)


def test_by_default_nothing_of_the_last_day_goes(store: Store):
    three_nights(store)
    write(store, "staged")
    before = paths(store)
    assert vacuum(store, Retention(num_snapshots=1)).snapshots == ()
    assert paths(store) == before


def test_sizes_are_those_of_the_files(local: Store):
    three_nights(local)
    sizes = {file.path: file.num_bytes for file in local.files("")}
    found = vacuum(local, ONE_NOW)
    gone = sizes.keys() - paths(local)
    for place, num_files in found.num_files.items():
        here = [path for path in gone if path.startswith(f"{place}/")]
        assert num_files == len(here) > 0
        assert found.num_bytes[place] == sum(sizes[path] for path in here)


def test_a_snapshot_stays_until_it_has_been_superseded_for_long_enough(local: Store):
    day = Retention(num_snapshots=1)
    commit(local, make_snapshot([write(local, "plan")]))
    pass_hours(local, 1000)
    assert vacuum(local, day).snapshots == ()
    commit(local, make_snapshot([write(local, "plan")], number=2))  # 1 was current until just now
    pass_hours(local, 23)
    assert vacuum(local, day).snapshots == ()
    last = write(local, "plan")
    commit(local, make_snapshot([last], number=3))
    pass_hours(local, 2)
    assert vacuum(local, day).snapshots == (1,)
    pass_hours(local, 21)
    assert vacuum(local, day).snapshots == ()
    pass_hours(local, 2)
    assert vacuum(local, day).snapshots == (2,)
    assert {path for path in paths(local) if "embeddings" in path} == {last.path}


def test_a_plan_that_is_added_to_keeps_its_early_files(local: Store):
    commit(local, make_snapshot([write(local, "old")]))
    early, rejects = write(local, "long"), write_rejects(local, "long")
    pass_hours(local, 100)
    left = write(local, "left", seed=1)
    pass_hours(local, 23)
    late = write(local, "long", seed=2)
    day = Retention(num_snapshots=1)
    vacuum(local, day)
    assert {early.path, rejects.path, late.path, left.path} <= paths(local)
    pass_hours(local, 2)
    vacuum(local, day)
    assert left.path not in paths(local)
    assert {early.path, rejects.path, late.path} <= paths(local)
    pass_hours(local, 23)
    vacuum(local, day)
    assert not {early.path, rejects.path, late.path} & paths(local)


def test_an_index_stays_while_it_is_young_or_a_kept_snapshot_has_it(local: Store):
    snapshots = three_nights(local)
    coming = make_snapshot([write(local, "coming", seed=9)], number=4)
    pass_hours(local, 100)
    indexed(local, coming)
    local.publish("indexes/00000001/image/index.faiss", b"of an earlier Clipmill")
    day = Retention(num_snapshots=1)
    assert vacuum(local, day).num_files["indexes"] == 2 * 5
    assert find_index(local, snapshots[2], modality="image") is not None
    assert find_index(local, coming, modality="image") is not None
    pass_hours(local, 25)
    assert vacuum(local, day).num_files["indexes"] == 5 + 1
    assert find_index(local, snapshots[2], modality="image") is not None
    assert paths(local) == all_of(local, snapshots[2])


def test_what_a_killed_writer_left_goes_and_so_do_empty_folders(local: Store):
    kept = write(local, "plan")
    commit(local, make_snapshot([kept]))
    local.publish("embeddings/plan/.image-0.parquet.0123", b"half")
    local.publish("embeddings/other/.image-0.parquet.0123", b"half")
    for probe in (".probe-0123", "..clock-0123.4567", "snapshots/.00000002.json.0123"):
        local.publish(probe, b"half")
    day = vacuum(local, Retention(num_snapshots=1))
    assert (sum(day.num_files.values()), day.snapshots) == (0, ())
    found = find_garbage(local, ONE_NOW)
    assert (found.num_files["snapshots"], found.snapshots) == (3, ())
    assert vacuum(local, ONE_NOW).num_files["embeddings"] == 2
    assert local.names("embeddings") == ["plan"]
    assert paths(local) == {kept.path, "snapshots/00000001.json"}


def test_what_lies_elsewhere_by_links_stays_whole(local: Store, tmp_path: Path):
    """Somebody moved a plan, a file and a manifest to another disk."""
    files = [write(local, "plan", seed=1), write(local, "moved", seed=2)]
    unlisted = write(local, "moved", seed=3)
    commit(local, make_snapshot(files))
    for moved in ("embeddings/moved", files[0].path, "snapshots/00000001.json"):
        target = tmp_path / moved.replace("/", "-")
        Path(local.full_path(moved)).rename(target)
        Path(local.full_path(moved)).symlink_to(target)
    commit(local, make_snapshot(files[:1], number=2))
    vacuum(local, ONE_NOW)
    for file in files:
        assert Path(local.full_path(file.path)).exists()
    assert not Path(local.full_path(unlisted.path)).exists()
    assert snapshot_numbers(local) == [1, 2]


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("content", [b"{", b'{"format_version": 99}'])
def test_a_manifest_that_cannot_be_read_stops_it_before_anything_is_removed(
    local: Store, number: int, content: bytes
):
    three_nights(local)
    write(local, "staged")
    local.publish(f"snapshots/{number:08d}.json", content)
    before = paths(local)
    with pytest.raises(StoreError, match=f"{number:08d}.json is (damaged|of format 99)"):
        vacuum(local, ONE_NOW)
    assert paths(local) == before


def test_a_store_without_a_snapshot_is_left_alone(local: Store, tmp_path: Path):
    staged = write(local, "staged")
    with pytest.raises(StoreError, match="has no snapshot, by which to tell"):
        vacuum(local, ONE_NOW)
    assert paths(local) == {staged.path}
    with pytest.raises(StoreError, match="has no snapshot"):
        vacuum(Store(str(tmp_path / "mistyped")), ONE_NOW)
    assert not (tmp_path / "mistyped").exists()


@pytest.mark.parametrize("store", ["memory"], indirect=True)
def test_where_ages_cannot_be_told_nothing_is_removed(
    store: Store, monkeypatch: pytest.MonkeyPatch
):
    three_nights(store)
    before = paths(store)
    with monkeypatch.context() as patch:
        patch.setattr("engine.publishing.folders.TIME_FIELDS", ("mtime",))
        with pytest.raises(StoreError, match="does not say when files were written"):
            vacuum(store, ONE_NOW)
    assert paths(store) == before


def test_what_would_be_removed_is_found_without_the_right_to_write(
    store: Store, monkeypatch: pytest.MonkeyPatch
):
    three_nights(store)

    def refused(*_: object) -> None:
        raise PermissionError

    with monkeypatch.context() as patch:
        for name in ("publish", "create", "remove", "remove_files"):
            patch.setattr(Folder, name, refused)
        found = find_garbage(store, ONE_NOW)
    assert found.snapshots == (1, 2)
    assert vacuum(store, ONE_NOW) == found


def test_ages_are_by_the_clock_of_the_file_system(local: Store, monkeypatch: pytest.MonkeyPatch):
    three_nights(local)
    now = local.current_time()
    monkeypatch.setattr(Store, "current_time", lambda _: now + timedelta(hours=25))
    assert vacuum(local, Retention(num_snapshots=1)).snapshots == (1, 2)


def test_the_clocks_of_those_who_commit_do_not_matter(store: Store):
    """Which snapshot is current goes by number, what is old by the clock of the file system."""
    times = ("2036-01-01T00:00:00+00:00", "1999-01-01T00:00:00+00:00", "2017-01-01T00:00:00+00:00")
    files = [write(store, f"plan{number}", seed=number) for number in range(len(times))]
    for number, (file, time_) in enumerate(zip(files, times, strict=True), 1):
        commit(store, dataclasses.replace(make_snapshot([file], number=number), created_at=time_))
    assert read_snapshot(store, None).created_at == times[-1]
    assert vacuum(store, Retention(num_snapshots=1)).snapshots == ()
    restored = rollback(store, 1)
    assert (restored.number, read_snapshot(store, None).files) == (4, (files[0],))
    assert vacuum(store, ONE_NOW).snapshots == (1, 2, 3)
    assert paths(store) == {restored.path, files[0].path}


class NotedStore(Store):
    """A store that remembers what was removed, and is killed before a certain removal."""

    def __init__(self, uri: str, *, num_removals: int | None = None) -> None:
        super().__init__(uri)
        self.removed: list[str] = []
        self._num_removals = num_removals

    def remove_files(self, relatives: Iterable[str]) -> None:
        for path in sorted(relatives):
            if len(self.removed) == self._num_removals:
                raise KilledError
            super().remove_files([path])
            self.removed.append(path)


class KilledError(Exception):
    pass


def test_manifests_go_first_and_indexes_last(local: Store):
    three_nights(local)
    store = NotedStore(local.uri)
    vacuum(store, ONE_NOW)
    kinds = [path.split("/")[0] for path in store.removed]
    assert store.removed[:2] == ["snapshots/00000001.json", "snapshots/00000002.json"]
    assert "snapshots" not in kinds[2:]
    assert kinds.index("indexes") > max(kinds.index("embeddings"), kinds.index("rejects"))
    assert set(kinds[kinds.index("indexes") :]) == {"indexes"}
    indexes = store.removed[kinds.index("indexes") :]
    assert [path.endswith("/manifest.json") for path in indexes] == [True, *[False] * 4] * 2


def test_numbers_count_on_and_those_gone_are_named(local: Store):
    snapshots = three_nights(local)
    vacuum(local, ONE_NOW)
    assert (snapshot_numbers(local), current_snapshot(local)) == ([3], snapshots[2])
    again = dataclasses.replace(snapshots[2], number=4, files=snapshots[2].files[:1])
    commit(local, again)
    assert rollback(local, 3).number == 5
    where = ["--store", local.uri]
    for words in (["show", "2"], ["diff", "2"], ["diff", "5", "1"], ["rollback", "1"]):
        done = command(main, [*words, *where])
        assert done.code == 1
        assert "it was vacuumed, or its manifest moved away. There are 3 to 5" in done.err
    assert "but 3 to 5" in command(main, ["show", "6", *where]).err
    vacuum(local, ONE_NOW)  # its `restores` and `parent` are gone
    assert [line.split()[0] for line in command(main, ["list", *where]).out.splitlines()] == ["5"]
    assert "after snapshot 4" in command(main, ["show", *where]).out
    assert find_index(local, read_snapshot(local, 5), modality="image") is not None


def test_what_is_rolled_back_to_while_it_is_vacuumed_stays_whole(
    local: Store, monkeypatch: pytest.MonkeyPatch
):
    """The rollback commits when the kept snapshots were found, and no manifest was removed."""
    snapshots = three_nights(local)
    remove_files = Store.remove_files

    def late(store: Store, relatives: Iterable[str]) -> None:
        monkeypatch.undo()
        rollback(local, 1)
        remove_files(store, relatives)

    monkeypatch.setattr(Store, "remove_files", late)
    assert vacuum(local, ONE_NOW).snapshots == (1, 2)
    restored = read_snapshot(local, None)
    assert (restored.number, restored.restores) == (4, 1)
    assert paths(local) >= all_of(local, restored, snapshots[2])


def test_what_was_vacuumed_while_it_was_rolled_back_to_is_not_restored(
    local: Store, monkeypatch: pytest.MonkeyPatch
):
    snapshots = three_nights(local)

    def late(store: Store, files: Iterable[StoredFile]) -> list[str]:
        vacuum(store, ONE_NOW)
        return []

    monkeypatch.setattr("pipelines.snapshots.missing_files", late)
    with pytest.raises(StoreError, match="snapshot 1 was vacuumed at this very moment"):
        rollback(local, 1)
    assert current_snapshot(local) == snapshots[2]


def test_the_command_says_what_goes(local: Store):
    three_nights(local)
    words = ["vacuum", "--store", local.uri, "--keep", "1"]
    assert command(main, words).out.splitlines()[0] == "snapshots removed: none"
    words += ["--min-age-hours", "0"]
    before = paths(local)
    dry = command(main, [*words, "--dry-run"])
    assert paths(local) == before
    lines = [line.split() for line in dry.out.splitlines()]
    assert lines[0] == ["snapshots", "to", "be", "removed:", "1", "to", "2"]
    assert [line[:3] for line in lines[1:]] == [
        ["snapshots", "2", "files"],
        ["embeddings", "2", "files"],
        ["rejects", "3", "files"],
        ["indexes", "10", "files"],
    ]
    counted = command(main, [*words, "--dry-run", "--json"]).json
    assert command(main, [*words, "--json"]).json == counted
    assert (counted["snapshots"], counted["num_files"]["rejects"]) == ([1, 2], 3)
    assert len(before) - len(paths(local)) == sum(counted["num_files"].values()) == 17
    assert command(main, ["vacuum", "--store", local.uri]).code == 2
    refused = command(main, ["vacuum", "--store", local.uri, "--keep", "0"])
    assert (refused.code, "expected at least 1 (--keep)" in refused.err) == (2, True)


@pytest.mark.parametrize("hours", [-1, float("nan")])
def test_bounds_are_checked(hours: float):
    with pytest.raises(ValueError, match=r"min_age_hours=.*: expected at least 0"):
        Retention(num_snapshots=1, min_age_hours=hours)


class World:
    """A store on a disk, and what a vacuum may leave of it, kept by simpler means."""

    def __init__(self, folder: str) -> None:
        self.store = Store(folder)
        self.hours = 0.0
        self.seeds = itertools.count()  # so that a snapshot has each key once
        self.written: dict[str, float] = {}  # path, or folder of an index -> when
        self.content: dict[str, bytes] = {}
        self.committed: dict[int, float] = {}
        self.listed: dict[int, Snapshot] = {}

    def write(self, plan: str, kind: str) -> StoredFile:
        seed = next(self.seeds)
        file = (
            write(self.store, plan, seed=seed)
            if kind == "embeddings"
            else write_rejects(self.store, plan, name=f"image-{seed}")
        )
        self.written[file.path] = self.hours
        self.content[file.path] = self.store.read(file.path)
        return file

    def commit(self, draw: random.Random, plan: str) -> None:
        current = current_snapshot(self.store)
        files = [] if current is None else [file for file in current.files if draw.random() < 0.7]
        files += [self.write(plan, kind) for kind in ("embeddings", "rejects")]
        number = 1 if current is None else current.number + 1
        assert number == max(self.committed, default=0) + 1
        snapshot = make_snapshot(files, number=number)
        commit(self.store, snapshot)
        self.note(snapshot)

    def rollback(self, draw: random.Random) -> None:
        if self.listed:
            # Only of one that is the same as the current one.
            with suppress(StoreError):
                self.note(rollback(self.store, draw.choice(sorted(self.listed))))

    def index(self) -> None:
        current = current_snapshot(self.store)
        if current is not None:
            folder = index_dir(current, modality="image")
            if find_index(self.store, current, modality="image") is None:
                self.written[folder] = self.hours
            indexed(self.store, current)

    def note(self, snapshot: Snapshot) -> None:
        self.committed[snapshot.number] = self.hours
        self.listed[snapshot.number] = snapshot

    def wait(self, hours: int) -> None:
        pass_hours(self.store, hours)
        self.hours += hours

    def vacuum(self, retention: Retention, *, num_removals: int | None) -> None:
        if not self.listed:
            return
        if num_removals is not None:
            with suppress(KilledError):
                vacuum(NotedStore(self.store.uri, num_removals=num_removals), retention)
            # What is listed is whole, whatever else is gone.
            for number in snapshot_numbers(self.store):
                self.check(read_snapshot(self.store, number))
        found = find_garbage(self.store, retention)
        assert vacuum(self.store, retention) == found
        self.forget(retention)
        assert snapshot_numbers(self.store) == sorted(self.listed)
        for number, snapshot in self.listed.items():
            assert read_snapshot(self.store, number) == snapshot
            self.check(snapshot)
        left = {file.path for kind in ("embeddings", "rejects") for file in self.store.files(kind)}
        left |= {f"indexes/{name}" for name in self.store.names("indexes")}
        assert left == set(self.written)

    def forget(self, retention: Retention) -> None:
        """What should be gone now."""
        numbers = sorted(self.listed)
        for number, successor in pairwise(numbers):
            age = self.hours - self.committed[successor]
            if number not in numbers[-retention.num_snapshots :] and age >= retention.min_age_hours:
                del self.listed[number]
        needed = {
            path
            for snapshot in self.listed.values()
            for path in (
                index_dir(snapshot, modality="image"),
                *(file.path for file in snapshot.files),
            )
        }
        newest: dict[str, float] = {}
        for path, hours in self.written.items():
            plan = path.split("/")[1]
            newest[plan] = max(hours, newest.get(plan, hours))
        self.written = {
            path: hours
            for path, hours in self.written.items()
            if path in needed or self.hours - newest[path.split("/")[1]] < retention.min_age_hours
        }

    def check(self, snapshot: Snapshot) -> None:
        for file in snapshot.files:
            assert self.store.read(file.path) == self.content[file.path]
            if file.kind == "embeddings":
                with self.store.open(file.path) as opened:
                    assert pq.read_table(opened).num_rows == file.num_rows


PLANS = st.sampled_from(["plan-a", "plan-b", "plan-c"])
KINDS = st.sampled_from(["embeddings", "rejects"])
RETENTIONS = st.builds(
    Retention,
    num_snapshots=st.integers(1, 3),
    min_age_hours=st.sampled_from([0, 1.5, 24.5]),  # never at an age that is possible
)
STEPS = st.one_of(
    st.tuples(st.just("commit"), PLANS),
    st.tuples(st.just("commit"), PLANS),
    st.tuples(st.just("rollback")),
    st.tuples(st.just("stage"), PLANS, KINDS),
    st.tuples(st.just("index")),
    st.tuples(st.just("wait"), st.sampled_from([1, 10, 30])),
    st.tuples(st.just("vacuum"), RETENTIONS, st.none() | st.integers(0, 12)),
)


@given(steps=st.lists(STEPS, min_size=5, max_size=25), last=RETENTIONS, seed=st.integers(0, 2**16))
@settings(max_examples=40)
def test_whatever_happens_what_is_listed_is_whole_and_the_rest_is_gone(
    steps: list[tuple[Any, ...]], last: Retention, seed: int
):
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        world = World(folder)
        for step, *arguments in [*steps, ("vacuum", last, None)]:
            match step:
                case "commit":
                    world.commit(draw, *arguments)
                case "rollback":
                    world.rollback(draw)
                case "stage":
                    world.write(*arguments)
                case "index":
                    world.index()
                case "wait":
                    world.wait(*arguments)
                case "vacuum":
                    world.vacuum(arguments[0], num_removals=arguments[1])


@pytest.mark.parametrize("num_removals", range(14))
def test_killed_after_any_removal_it_leaves_all_that_is_listed_whole(
    local: Store, num_removals: int
):
    snapshots = three_nights(local)
    killed = NotedStore(local.uri, num_removals=num_removals)
    with suppress(KilledError):
        vacuum(killed, ONE_NOW)
    assert len(killed.removed) == min(num_removals, 17)
    for number in snapshot_numbers(local):
        assert {file.path for file in read_snapshot(local, number).files} <= paths(local)
    assert sum(vacuum(local, ONE_NOW).num_files.values()) == 17 - len(killed.removed)
    assert paths(local) == all_of(local, snapshots[2])


def test_what_a_killed_run_left_beside_its_report_goes(tmp_path: Path):
    local = Store(str(tmp_path))
    three_nights(local)
    for name in ("run.json", ".run.json.0123"):
        local.publish(f"runs/run/{name}", b"{}")
    vacuum(local, Retention(num_snapshots=3, min_age_hours=0))
    assert [path.name for path in (tmp_path / "runs" / "run").iterdir()] == ["run.json"]
