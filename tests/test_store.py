"""Tests of pipelines/store.py on a disk, in memory and on an S3 server."""

import os
import pickle
import resource
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pipelines.errors import CommitConflictError, StoreError
from pipelines.store import Store
from tests.object_store import s3_bucket, unreliable_bucket
from tests.waiting import WAIT_SECONDS

ROOT = Path(__file__).parents[1]


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
    return Store(str(tmp_path))


def python(script: str, *arguments: str, before: tuple[str, ...] = ()) -> str:
    """Run a script in another process, from the repository root; returns what it printed."""
    done = subprocess.run(
        [*before, sys.executable, "-c", script, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=WAIT_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_is_published_is_read_again(store):
    store.publish("deep/down/file", b"content")
    assert store.read("deep/down/file") == b"content"


def test_an_empty_file_is_a_file(store):
    store.publish("folder/empty", b"")
    assert store.read("folder/empty") == b""


def test_publishing_replaces(store):
    store.publish("folder/file", b"a long first content")
    store.publish("folder/file", b"second")
    assert store.read("folder/file") == b"second"
    assert store.list("folder", suffix="") == ["folder/file"]


def test_creating_does_not_replace(store):
    store.create("snapshots/1.json", b"first")
    with pytest.raises(CommitConflictError, match="run the same command again"):
        store.create("snapshots/1.json", b"second")
    assert store.read("snapshots/1.json") == b"first"
    assert store.list("snapshots", suffix="") == ["snapshots/1.json"]


def test_lists_the_files_of_a_folder_by_name_and_nothing_else(store):
    for name in ("b.json", "a.json", "c.txt", "deeper/d.json", ".hidden.json"):
        store.publish(f"folder/{name}", b"x")
    store.publish("folder2/e.json", b"x")
    assert store.list("folder", suffix=".json") == ["folder/a.json", "folder/b.json"]


def test_a_folder_that_is_not_there_has_no_files(store):
    assert store.list("nowhere", suffix="") == []


def test_sees_what_another_process_has_added(store):
    store.publish("folder/a", b"x")
    assert store.list("folder", suffix="") == ["folder/a"]
    fs, path = fsspec.url_to_fs(store.uri, skip_instance_cache=True)
    fs.pipe_file(f"{path}/folder/b", b"x")
    assert store.list("folder", suffix="") == ["folder/a", "folder/b"]


def test_reading_what_is_not_there_names_store_and_file(store):
    with pytest.raises(StoreError, match=f"(?s){store.uri}.*folder/file cannot be read"):
        store.read("folder/file")
    with (
        pytest.raises(StoreError, match="folder/file cannot be read"),
        store.open("folder/file") as file,
    ):
        file.read()


def test_opens_at_any_position(store):
    store.publish("file", b"0123456789")
    with store.open("file") as file:
        file.seek(-3, os.SEEK_END)
        assert file.read() == b"789"


def test_of_an_object_no_more_is_fetched_than_is_read():
    with unreliable_bucket(seed=0) as (bucket, traffic):
        store = Store(bucket)
        store.publish("file", bytes(1_000_000))
        with store.open("file") as file:
            file.seek(1000)
            num_bytes = traffic.num_bytes
            assert file.read(10) == bytes(10)
            assert traffic.num_bytes - num_bytes == 10


def test_a_parquet_file_that_is_damaged_is_an_error_of_the_store(store):
    store.publish("a.parquet", b"PAR1 this is no Parquet file PAR1")
    with (
        pytest.raises(StoreError, match=r"a\.parquet is damaged .* put back a copy"),
        store.open("a.parquet") as file,
    ):
        pq.read_table(file)


def test_a_bug_in_what_is_done_with_an_open_file_stays_a_bug(store):
    store.publish("file", b"x")
    with pytest.raises(ZeroDivisionError), store.open("file"):
        _ = 1 / 0


def test_checking_that_it_is_writable_leaves_nothing(store):
    store.check_writable()
    fs, path = fsspec.url_to_fs(store.uri)
    assert fs.find(path) == []


class Careless(MemoryFileSystem):
    """An object store that does not know If-None-Match."""

    protocol = "careless"

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        return super()._open(path, mode.replace("x", "w"), **options)


def test_a_store_that_replaces_what_is_to_be_created_is_refused(tmp_path):
    fsspec.register_implementation("careless", Careless, clobber=True)
    store = Store(f"careless://{tmp_path.name}/store")
    with pytest.raises(StoreError, match=r"ignores If-None-Match\?\), so two runs at once would"):
        store.check_writable()
    assert store.hidden_files("") == []


# fsspec's memory file system makes no promise to threads.
@pytest.mark.parametrize("store", ["local", "s3"], indirect=True)
def test_of_eight_writers_at_once_exactly_one_creates(store):
    def create(writer: int) -> int | None:
        try:
            Store(store.uri).create("snapshots/1.json", bytes([writer]) * 300_000)
        except CommitConflictError:
            return None
        return writer

    with ThreadPoolExecutor(8) as threads:
        winners = [winner for winner in threads.map(create, range(8)) if winner is not None]
    assert len(winners) == 1
    assert store.read("snapshots/1.json") == bytes(winners) * 300_000
    assert store.list("snapshots", suffix="") == ["snapshots/1.json"]


RACE = """
import os, sys, time
from pipelines.errors import CommitConflictError
from pipelines.store import Store
start = time.time() + 0.2
children = {}
for writer in range(8):
    child = os.fork()
    if child == 0:
        store = Store(sys.argv[1])
        time.sleep(max(0, start - time.time()))
        try:
            store.create("snapshots/1.json", bytes([65 + writer]) * 300_000)
        except CommitConflictError:
            os._exit(3)
        except BaseException:
            os._exit(4)
        os._exit(0)
    children[child] = writer
for child, writer in children.items():
    print(writer, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_of_eight_processes_exactly_one_creates(local):
    codes = dict(line.split() for line in python(RACE, local.uri).splitlines())
    winners = [writer for writer, code in codes.items() if code == "0"]
    assert sorted(codes.values()) == ["0"] + ["3"] * 7
    assert local.read("snapshots/1.json") == bytes([65 + int(winners[0])]) * 300_000
    assert os.listdir(local.full_path("snapshots")) == ["1.json"]


def test_a_path_under_a_file_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    store = Store(str(tmp_path / "file" / "store"))
    with pytest.raises(StoreError, match="cannot be written"):
        store.check_writable()


@pytest.mark.parametrize("write", [Store.publish, Store.create])
def test_a_file_in_the_place_of_a_folder_is_no_conflict(local, tmp_path, write):
    (tmp_path / "snapshots").write_text("not a folder")
    with pytest.raises(StoreError, match="cannot be written") as error:
        write(local, "snapshots/1.json", b"x")
    assert not isinstance(error.value, CommitConflictError)


def test_a_bucket_that_is_not_there_cannot_be_written(bucket):
    with pytest.raises(StoreError, match="bucket does not exist"):
        Store("s3://another-bucket/store").check_writable()


READ_ONLY = """
import os, sys
from pipelines.errors import CommitConflictError, StoreError
from pipelines.store import Store
store = Store(sys.argv[1])
if os.getuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
for write in (store.publish, store.create):
    try:
        write("1.json", b"x")
    except CommitConflictError:
        print("conflict")
    except StoreError as error:
        print(error)
print(store.read("there").decode())
"""


def test_a_read_only_folder_can_be_read_and_not_written():
    # Not in tmp_path: another user may not even enter that.
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "there").write_text("content")
        os.chmod(folder, stat.S_IRUSR | stat.S_IXUSR | stat.S_IROTH | stat.S_IXOTH)
        printed = python(READ_ONLY, folder).splitlines()
        os.chmod(folder, stat.S_IRWXU)
        assert os.listdir(folder) == ["there"]
    assert len(printed) == 3
    assert all("1.json cannot be written: Permission denied" in line for line in printed[:2])
    assert printed[2] == "content"


MOUNT = ("unshare", "--mount", "--map-root-user")
FULL_DISK = """
import os, subprocess, sys
from pipelines.errors import CommitConflictError, StoreError
from pipelines.store import Store
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", sys.argv[1]], check=True)
store = Store(sys.argv[1])
store.publish("folder/small", b"x" * 100_000)
for write in (store.publish, store.create):
    for name in ("folder/large", "folder/small"):
        try:
            write(name, b"y" * 2_000_000)
        except CommitConflictError:
            print("conflict")
        except StoreError as error:
            print(error)
print(os.listdir(sys.argv[1] + "/folder"), len(store.read("folder/small")))
"""


def test_a_full_disk_keeps_no_half_file(tmp_path):
    try:
        subprocess.run(
            [*MOUNT, "mount", "-t", "tmpfs", "tmpfs", str(tmp_path)],
            check=True,
            capture_output=True,
        )
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs a tmpfs in a mount namespace of its own: {error}")
    *errors, left = python(FULL_DISK, str(tmp_path), before=MOUNT).splitlines()
    assert len(errors) == 4
    assert all("cannot be written: No space left on device" in error for error in errors)
    assert left == "['small'] 100000"


def test_a_file_beyond_the_limit_of_the_process_leaves_no_half_file(local, tmp_path):
    local.publish("folder/small", b"x")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        for write in (local.publish, local.create):
            with pytest.raises(StoreError, match="File too large"):
                write("folder/large", b"y" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path / "folder") == ["small"]


def test_an_unknown_kind_of_store_is_refused():
    with pytest.raises(StoreError, match="nope"):
        Store("nope://bucket/store")


def test_only_a_folder_of_a_mounted_file_system_is_local(store):
    assert store.is_local == Path(store.uri).is_absolute()
    assert store.full_path("file").endswith("/store/file")


def test_a_store_can_be_sent_to_a_worker(local):
    local.publish("file", b"content")
    assert pickle.loads(pickle.dumps(local)).read("file") == b"content"
