"""What a folder does the same on a disk, in memory and on S3; test_store.py has the rest."""

import pickle
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from botocore.exceptions import ClientError
from fsspec.asyn import sync_wrapper
from s3fs.errors import translate_boto_error

from engine.errors import ClipmillError
from engine.publishing import folders
from engine.publishing.folders import Folder
from tests.closed_folders import close
from tests.object_store import FAULTS, Unreliable, s3_bucket, unreliable_bucket


class ShelfError(ClipmillError):
    pass


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3_bucket() as uri:
        yield uri


@pytest.fixture(params=["local", "memory", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    uri = str(tmp_path / "shelf")
    if request.param == "memory":
        uri = f"memory://{tmp_path.name}/shelf"
    elif request.param == "s3":
        uri = f"{request.getfixturevalue('bucket')}/{tmp_path.name}/shelf"
    return Folder(uri, called="shelf", error=ShelfError, way_out="Ask the librarian")


def test_of_two_who_create_a_file_the_first_one_does(folder: Folder):
    folder.create("deep/down/file", b"first")
    with pytest.raises(FileExistsError, match="deep/down/file exists"):
        folder.create("deep/down/file", b"second")
    assert folder.read("deep/down/file") == b"first"


@pytest.mark.parametrize("folder", ["s3"], indirect=True)
@pytest.mark.parametrize("num_conflicts", [1, 3, 1_000])
def test_who_is_told_to_try_again_does(
    folder: Folder, num_conflicts: int, monkeypatch: pytest.MonkeyPatch
):
    """As S3 itself, unlike the server here, tells some of those who create an object at once."""
    monkeypatch.setattr(folders, "CREATE_PAUSE_SECONDS", 0.01)
    error = {"Code": "ConditionalRequestConflict", "Message": "A conflicting operation occurred"}
    answers = iter([ClientError({"Error": error}, "PutObject")] * num_conflicts)
    call_s3 = folder._fs._call_s3

    async def call(method: str, *args: object, **options: object) -> object:
        answer = next(answers, None) if method == "put_object" else None
        if answer is not None:
            raise translate_boto_error(answer)
        return await call_s3(method, *args, **options)

    monkeypatch.setattr(folder._fs, "_call_s3", call)
    monkeypatch.setattr(folder._fs, "call_s3", sync_wrapper(call, obj=folder._fs))
    if num_conflicts > folders.NUM_CREATE_TRIES:
        with pytest.raises(ShelfError, match="A conflicting operation occurred"):
            folder.create("file", b"content")
        return
    folder.create("file", b"content")
    assert folder.read("file") == b"content"
    with pytest.raises(FileExistsError):
        folder.create("file", b"another")


@pytest.fixture
def unreliable(tmp_path: Path) -> Iterator[tuple[Folder, Unreliable]]:
    """A folder of an object store, and what can be planned to happen to requests."""
    with unreliable_bucket(seed=0) as (uri, faults):
        yield Folder(f"{uri}/shelf", called="shelf", error=ShelfError), faults


def first(fault: str, *, method: str = "PUT") -> Callable[[str, str], str | None]:
    """Happens to the first such request alone."""
    faults = iter([fault])
    return lambda method_, path: next(faults, None) if method_ == method else None


@pytest.mark.parametrize("fault", FAULTS)
def test_who_created_a_file_is_told_so_even_if_the_first_answer_is_lost(
    unreliable: tuple[Folder, Unreliable], fault: str
):
    folder, faults = unreliable
    faults.planned = first(fault)
    folder.create("file", b"mine")
    with pytest.raises(FileExistsError):
        folder.create("file", b"another's")
    assert folder.read("file") == b"mine"


def test_an_answer_that_is_lost_does_not_give_us_what_another_created(
    unreliable: tuple[Folder, Unreliable],
):
    folder, faults = unreliable
    folder.create("file", b"another's")
    faults.planned = first("lost after")
    with pytest.raises(FileExistsError):
        folder.create("file", b"mine")
    assert folder.read("file") == b"another's"


@pytest.mark.parametrize("fault", FAULTS)
def test_a_request_that_fails_is_made_again(unreliable: tuple[Folder, Unreliable], fault: str):
    folder, faults = unreliable
    for method in ("PUT", "GET", "HEAD", "POST", "DELETE"):
        faults.planned = first(fault, method=method)
        folder.publish("deep/file", b"content")
        assert folder.read("deep/file") == b"content"
        assert folder.names("deep") == ["file"]
        folder.remove("deep")
        folder.publish("deep/file", b"content")
        folder.remove_files(["deep/file"])
        assert folder.files("") == []


def test_a_store_that_refuses_is_an_error_that_says_so(unreliable: tuple[Folder, Unreliable]):
    folder, faults = unreliable
    faults.planned = lambda method, path: "access denied" if method == "PUT" else None
    for write in (folder.publish, folder.create):
        with pytest.raises(ShelfError, match=r"cannot be written: Access Denied\. Check the p"):
            write("file", b"content")


@pytest.mark.parametrize("folder", ["local"], indirect=True)
def test_a_folder_that_may_not_be_listed_is_not_an_empty_one(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
):
    folder.publish("open/file", b"x")
    folder.publish("open/closed/file", b"x")
    close(Path(folder.full_path("open/closed")), monkeypatch)
    for ask in (folder.files, folder.num_bytes, folder.modified_at):
        with pytest.raises(ShelfError, match=r"open cannot be \w+: Permission denied"):
            ask("open")
    monkeypatch.undo()
    assert folder.num_bytes("open") == 2


def test_what_is_not_there_is_none_or_an_error_of_the_chosen_kind(folder: Folder):
    assert folder.read_if_there("gone/file") is None
    folder.publish("there", b"content")
    assert folder.read_if_there("there") == b"content"
    with pytest.raises(ShelfError, match=r"shelf \S+shelf: gone/file cannot be read: .*librarian"):
        folder.read("gone/file")
    with pytest.raises(ShelfError, match="gone/file cannot be read"):
        folder.modified_at("gone/file")


def test_names_files_and_folders_but_nothing_hidden(folder: Folder):
    assert folder.names("") == []
    for name in ("b/c/d", "a", "b/e", ".hidden/f"):
        folder.publish(name, b"x")
    assert folder.names("") == ["a", "b"]
    assert folder.names("b") == ["c", "e"]
    assert folder.names("a/no/folder") == []
    assert folder.names("a") == folder.names("b/e") == []


def test_files_of_a_disk_come_and_go(folder: Folder, tmp_path: Path):
    content = bytes(range(256)) * 50_000  # beyond what is sent in one piece
    (tmp_path / "file").write_bytes(content)
    folder.publish("deep/file", b"before")
    folder.upload(tmp_path / "file", "deep/file")
    folder.download("deep/file", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == content
    with pytest.raises(ShelfError, match="deep/gone cannot be read"):
        folder.download("deep/gone", tmp_path / "copy")


def test_removes_a_file_or_a_folder_and_no_namesake(folder: Folder):
    for name in ("a/b/c", "a/d", "ab/e", "f", "fg"):
        folder.publish(name, b"x")
    folder.remove("a")
    folder.remove("f")
    folder.remove("gone")
    assert folder.names("") == ["ab", "fg"]
    assert folder.read("ab/e") == b"x"


def test_sizes_are_of_all_that_lies_within(folder: Folder):
    for name in ("a/b/c", "a/d", "ab/e"):
        folder.publish(name, b"12345")
    assert folder.num_bytes("a") == 10
    assert folder.num_bytes("a/d") == 5
    assert folder.num_bytes("gone") == 0


def test_files_know_when_they_were_written_and_folders_the_newest_of_them(folder: Folder):
    folder.publish("folder/deep/file", b"x")
    first = folder.modified_at("folder/deep/file")
    assert abs(first - datetime.now(UTC)) < timedelta(minutes=1)
    time.sleep(1.1)  # S3 counts seconds
    folder.publish("folder/new", b"x")
    assert folder.modified_at("folder") == folder.modified_at("folder/new") > first
    assert folder.modified_at("folder/deep") == first


def test_files_are_listed_with_sizes_and_times(folder: Folder):
    for name in ("a/b/c", "a/.d", "ab/e"):
        folder.publish(name, b"12345")
    assert {file.path: file.num_bytes for file in folder.files("a")} == {"a/b/c": 5, "a/.d": 5}
    (itself,) = folder.files("ab/e")
    assert (itself.path, itself.num_bytes) == ("ab/e", 5)
    assert abs(itself.modified_at - folder.modified_at("ab/e")) < timedelta(seconds=1)
    assert folder.files("gone") == folder.files("a/b/c/d") == []


def test_hidden_files_are_those_of_one_folder(folder: Folder):
    for name in (".a", "b", "c/.d", "c/e/.f", "c/.g/h"):
        folder.publish(name, b"12345")
    assert [(file.path, file.num_bytes) for file in folder.hidden_files("")] == [(".a", 5)]
    assert [file.path for file in folder.hidden_files("c")] == ["c/.d"]
    assert folder.hidden_files("gone") == []


@pytest.mark.parametrize("folder", ["local"], indirect=True)
def test_links_are_no_files_but_lead_to_them(folder: Folder, tmp_path: Path):
    folder.publish("elsewhere/file", b"x")
    (tmp_path / "shelf/linked").symlink_to(tmp_path / "shelf/elsewhere")
    (tmp_path / "shelf/elsewhere/link").symlink_to(tmp_path / "shelf/elsewhere/file")
    assert [file.path for file in folder.files("elsewhere")] == ["elsewhere/file"]
    assert [file.path for file in folder.files("linked")] == ["linked/file"]


def test_the_clock_is_that_of_the_file_system(folder: Folder):
    folder.publish("before", b"x")
    now = folder.current_time()
    assert folder.files("before")[0].modified_at <= now
    assert abs(now - datetime.now(UTC)) < timedelta(minutes=1)
    assert [file.path for file in folder.files("")] == ["before"]


@pytest.mark.parametrize("folder", ["memory"], indirect=True)
def test_a_file_system_without_times_tells_no_ages(folder: Folder, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(folders, "TIME_FIELDS", ("mtime",))
    folder.publish("file", b"x")
    for ask in (lambda: folder.files(""), folder.current_time):
        with pytest.raises(
            ShelfError, match="does not say when files were written, so that nobody"
        ):
            ask()
    monkeypatch.undo()
    assert [file.path for file in folder.files("")] == ["file"]


def test_files_are_removed_and_folders_that_this_empties(folder: Folder, tmp_path: Path):
    names = [f"a/{number}" for number in range(40)]
    for name in (*names, "a/b/[0]", "a/b/0", "c/d"):
        folder.publish(name, b"x")
    folder.remove_files([*names, "a/b/[0]", "gone/file"])
    assert {file.path for file in folder.files("")} == {"a/b/0", "c/d"}
    folder.remove_files([])
    folder.remove_files(["a/b/0", "c/d"])
    assert folder.files("") == []
    if folder.is_local:
        assert [path.name for path in (tmp_path / "shelf").iterdir()] == ["a"]  # b was in it


@pytest.mark.parametrize("folder", ["local"], indirect=True)
def test_folders_in_folders_go_too_but_not_those_at_the_top(folder: Folder, tmp_path: Path):
    folder.publish("a/b/c/d", b"x")
    folder.publish("e/f", b"x")
    folder.remove_files(["e/f"])
    folder.remove_files(["a/b/c/d"])
    assert [path.name for path in (tmp_path / "shelf").rglob("*")] == ["a"]


@pytest.mark.parametrize("folder", ["local"], indirect=True)
def test_what_cannot_be_removed_is_an_error(folder: Folder):
    folder.publish("a/b", b"x")
    with pytest.raises(ShelfError, match=r"files cannot be removed: .*librarian"):
        folder.remove_files(["a"])
    assert folder.read("a/b") == b"x"


def test_an_unknown_kind_of_folder_is_an_error_of_the_chosen_kind():
    with pytest.raises(ShelfError, match=r"shelf nope://bucket: .*nope"):
        Folder("nope://bucket", called="shelf", error=ShelfError)


@pytest.mark.parametrize("char", "#?*[")
def test_what_would_be_a_query_or_a_pattern_is_refused_in_a_uri_and_by_the_letter_in_a_path(
    tmp_path: Path, char: str
):
    for uri in (f"memory://a{char}b", f"s3://bucket/a{char}b", f"file://{tmp_path}/a{char}b"):
        with pytest.raises(ShelfError, match=r"shelf \w+://.* none of # \? \* \["):
            Folder(uri, called="shelf", error=ShelfError)
    here, beside = (
        Folder(f"{tmp_path}/{name}", called="shelf", error=ShelfError)
        for name in (f"a{char}b", "axb")
    )
    for folder in (here, beside):
        folder.publish("file", b"x")
    here.remove("file")
    assert (here.names(""), beside.names("")) == ([], ["file"])


def test_travels_to_workers(folder: Folder):
    folder.publish("file", b"content")
    travelled = pickle.loads(pickle.dumps(folder))
    assert travelled.read("file") == b"content"
    with pytest.raises(ShelfError, match="librarian"):
        travelled.read("gone")


def test_the_size_of_a_file(folder: Folder) -> None:
    folder.publish("books/a", b"abc")
    assert folder.file_bytes("books/a") == 3
    assert folder.file_bytes("books/b") is None
    if folder.is_local:
        link = Path(folder.full_path("books/b"))
        link.symlink_to(folder.full_path("books/a"))
        assert folder.file_bytes("books/b") == 3
        Path(folder.full_path("books/a")).unlink()
        assert not folder.file_bytes("books/b")
