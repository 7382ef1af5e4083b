"""Nights on disks that are full and on object stores that fail: done later, and the same."""

import dataclasses
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jobs import nightly
from pipelines.snapshots import snapshot_numbers
from pipelines.store import Store
from tests.catalogs import scene_rows, write_rows
from tests.commands import Done, command
from tests.kills import check_same, state_of, write_catalogs
from tests.night_process import NightProcess, night_process
from tests.object_store import Unreliable, unreliable_bucket

NUM_ROWS = 160
MAX_NIGHTS = 6
MOUNT = ("unshare", "--mount", "--map-root-user", "sh", "-c")


@dataclasses.dataclass(frozen=True)
class Night:
    """What brings a store up to a catalog."""

    catalog: str
    engines_dir: Path
    checkpoint_dir: Path

    def words(self, store: object) -> list[str]:
        words = ["--json", "--catalog", self.catalog, "--store", store]
        words += ["--checkpoint", self.checkpoint_dir, "--engines", self.engines_dir]
        words += ["--rows-per-file", "32", "--batch-rows", "16", "--max-deletions", "1"]
        return [str(word) for word in words]


def failed(done: Done) -> str:
    """What a night that ended with 1 said: a text for people, and no traceback."""
    assert (done.code, done.out) == (1, ""), done.err
    assert "Traceback" not in done.err
    *_, said = [line for line in done.err.splitlines() if line.startswith("clipmill: ")]
    return said


@pytest.fixture
def night(tmp_path: Path, checkpoint_dir: Path, engines_dir: Path) -> Night:
    return Night(str(tmp_path / "catalog"), engines_dir, checkpoint_dir)


@pytest.fixture
def own_ray(local_ray: None, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """`clipmill nightly` in this process."""
    from contextlib import nullcontext

    monkeypatch.setattr(nightly, "ray_cluster", lambda *_, **__: nullcontext())
    return lambda words: command(nightly.main, words)


def test_a_night_on_a_full_disk_is_finished_once_there_is_room(
    tmp_path: Path, night: Night, own_ray: Callable[..., Done]
):
    base, disk, whole = tmp_path / "base", tmp_path / "disk", tmp_path / "whole"
    change = write_catalogs(tmp_path / "catalog", num_rows=NUM_ROWS)
    assert own_ray(night.words(base)).code == 0
    change()
    shutil.copytree(base, whole)
    assert own_ray(night.words(whole)).code == 0

    disk.mkdir()
    mount = f"mount -t tmpfs -o size=8m tmpfs {disk}"
    try:
        subprocess.run([*MOUNT, mount], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs a tmpfs in a mount namespace of its own: {error}")
    with night_process(before=[*MOUNT, f'{mount} && exec "$@"', "sh"]) as process:
        process.copy(base, disk)
        for num_left in (0, 256 * 2**10):
            process.fill(disk, num_left=num_left)
            said = failed(process.night(*night.words(disk)))
            assert "cannot be written: No space left on device. Check the path, its " in said
            assert said.endswith("and the free space")
            left = tmp_path / f"left-{num_left}"
            process.copy(disk, left)
            assert snapshot_numbers(Store(str(left))) == [1]
            check_same(state_of(left), state_of(base))
            (left / ".ballast").unlink()
            # Nothing half-written, nothing hidden.
            assert not [path for path in left.rglob(".*") if path.is_file()]
        process.fill(disk, num_left=3 * 2**20)
        done = process.night(*night.words(disk))
        assert done.code == 0, done.err
        assert done.json["snapshot"] == 2
        process.copy(disk, tmp_path / "finished")
    check_same(state_of(tmp_path / "finished"), state_of(whole))


@dataclasses.dataclass(frozen=True)
class Bucket:
    """A catalog and stores on an object store that fails when it is told to."""

    uri: str
    faults: Unreliable
    night: Night
    process: NightProcess


@pytest.fixture(scope="module")
def bucket(
    tmp_path_factory: pytest.TempPathFactory, checkpoint_dir: Path, engines_dir: Path
) -> Iterator[Bucket]:
    """With yesterday's night in `base`, today's in `whole`, and today's catalog."""
    local = tmp_path_factory.mktemp("catalogs") / "catalog"
    change = write_catalogs(local, num_rows=NUM_ROWS)
    # One try by botocore for each by s3fs: what always fails is given up after seconds.
    environment = {"AWS_MAX_ATTEMPTS": "2"}
    with (
        unreliable_bucket(seed=0) as (uri, faults),
        night_process(environment=environment) as process,
    ):
        night = Night(f"{uri}/catalog", engines_dir, checkpoint_dir)
        made = Bucket(uri, faults, night, process)
        store = Store(uri)
        for is_today in (False, True):
            if is_today:
                change()
            for path in local.iterdir():
                store.upload(path, f"catalog/{path.name}")
            if is_today:
                copy_base(made, "whole")
            done = process.night(*night.words(f"{uri}/{'whole' if is_today else 'base'}"))
            assert done.code == 0, done.err
        yield made


def copy_base(bucket: Bucket, name: str) -> str:
    """The URI of a store as it was yesterday."""
    store = Store(bucket.uri)
    for file in store.files("base"):
        store.publish(file.path.replace("base/", f"{name}/", 1), store.read(file.path))
    return f"{bucket.uri}/{name}"


@pytest.fixture
def whole(bucket: Bucket) -> Iterator[None]:
    """From here on the store fails as a test says, and at its end no more."""
    yield
    bucket.faults.share = 0
    bucket.faults.planned = lambda method, path: None


@pytest.mark.usefixtures("whole")
def test_a_night_on_a_store_that_fails_now_and_then_comes_out_the_same(bucket: Bucket):
    uri = copy_base(bucket, "failing")
    before = dict(bucket.faults.num_faults)
    bucket.faults.share = 0.1
    for _ in range(MAX_NIGHTS):
        num_faults = sum(bucket.faults.num_faults.values())
        done = bucket.process.night(*bucket.night.words(uri))
        if done.code == 0:
            break
        assert sum(bucket.faults.num_faults.values()) > num_faults
        # Which of the two depends on whether a read or a write was given up.
        said = failed(done)
        assert "Check the path, its permissions" in said or "run the same command again" in said
        bucket.faults.share /= 2
    assert done.code == 0, done.err
    bucket.faults.share = 0
    assert all(num > before[fault] for fault, num in bucket.faults.num_faults.items())
    check_same(state_of(uri), state_of(f"{bucket.uri}/whole"))


@pytest.mark.usefixtures("whole")
def test_a_store_that_refuses_the_commit_is_asked_again_later(bucket: Bucket):
    uri = copy_base(bucket, "slow")
    bucket.faults.planned = lambda method, path: (
        "slow down" if method == "PUT" and path.endswith("snapshots/00000002.json") else None
    )
    said = failed(bucket.process.night(*bucket.night.words(uri)))
    assert "snapshots/00000002.json cannot be written: " in said
    assert snapshot_numbers(Store(uri)) == [1]
    check_same(state_of(uri), state_of(f"{bucket.uri}/base"))
    bucket.faults.planned = lambda method, path: None
    done = bucket.process.night(*bucket.night.words(uri))
    assert (done.json["outcome"], done.json["snapshot"]) == ("committed", 2)
    assert done.json["run"]["num_embedded"] == {"image": 0, "text": 0}
    check_same(state_of(uri), state_of(f"{bucket.uri}/whole"))


@pytest.mark.usefixtures("whole")
def test_a_commit_whose_answer_is_lost_is_no_conflict(bucket: Bucket):
    uri = copy_base(bucket, "lost")
    lost: list[str] = []

    def lose_the_first(method: str, path: str) -> str | None:
        if method == "PUT" and path.endswith("snapshots/00000002.json") and not lost:
            lost.append(path)
            return "lost after"
        return None

    bucket.faults.planned = lose_the_first
    done = bucket.process.night(*bucket.night.words(uri))
    assert done.code == 0, done.err
    assert (done.json["outcome"], done.json["snapshot"], len(lost)) == ("committed", 2, 1)


@pytest.mark.usefixtures("whole")
def test_a_store_that_may_not_be_written_stops_the_night_before_any_work(bucket: Bucket):
    uri = copy_base(bucket, "forbidden")
    bucket.faults.planned = lambda method, path: "access denied" if method == "PUT" else None
    said = failed(bucket.process.night(*bucket.night.words(uri)))
    assert "cannot be written: Access Denied. Check the path, its permissions" in said
    check_same(state_of(uri), state_of(f"{bucket.uri}/base"))
    assert {file.path for file in Store(uri).files("embeddings")} == {
        file.path for file in Store(f"{bucket.uri}/base").files("embeddings")
    }


def test_a_catalog_that_is_gone_midway_stops_the_night_until_it_is_back(
    tmp_path: Path,
    night: Night,
    own_ray: Callable[..., Done],
    monkeypatch: pytest.MonkeyPatch,
):
    store_dir, catalog_dir, away = tmp_path / "store", tmp_path / "catalog", tmp_path / "away"
    write_rows(catalog_dir, scene_rows(60), num_files=3)
    from pipelines.embedding import write_due

    def gone(*args, **options):
        os.rename(catalog_dir, away)
        return write_due(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr("pipelines.embedding.write_due", gone)
        said = failed(own_ray(night.words(store_dir)))
    assert "cannot be read" in said
    assert "If the file is gone, put it back; then run the same command again" in said
    assert snapshot_numbers(Store(str(store_dir))) == []
    assert "no .parquet file there" in failed(own_ray(night.words(store_dir)))
    os.rename(away, catalog_dir)
    assert own_ray(night.words(store_dir)).code == 0
    assert state_of(store_dir).manifest["catalog"]["num_keys"] == 60
