"""Tests of pipelines/fetching/fetch.py against an HTTP server and an S3 server on this machine."""

import os
import socket
from collections.abc import Callable, Iterator

import fsspec
import pytest
import s3fs

from pipelines.fetching.fetch import NUM_FETCHES, FetchFailure, fetch_all
from pipelines.fetching.fetch_policy import FetchPolicy
from tests.image_server import CONTENT, ImageServer, image_server
from tests.object_store import s3_bucket
from tests.waiting import WAIT_SECONDS

MAX_BYTES = 1_000_000
# The servers are on this machine, and so are files.
LOCAL = FetchPolicy(allow=("127.0.0.1", "file:", "s3:"))


@pytest.fixture
def server() -> Iterator[ImageServer]:
    with image_server() as server:
        yield server


def fetched(
    uri: str, *, max_bytes: int = MAX_BYTES, policy: FetchPolicy = LOCAL
) -> bytes | FetchFailure:
    (content,) = fetch_all([uri.encode()], max_bytes=max_bytes, policy=policy)
    return content


def failure(uri: str, *, policy: FetchPolicy = LOCAL) -> str:
    content = fetched(uri, policy=policy)
    assert isinstance(content, FetchFailure), content
    assert 0 < len(content.detail) <= 200
    assert "\n" not in content.detail
    return content.detail


def refusal(uri: str, *, policy: FetchPolicy = LOCAL) -> str:
    content = fetched(uri, policy=policy)
    assert isinstance(content, FetchFailure), content
    assert content.reason == "fetch_refused", content
    return content.detail


def test_fetches_with_one_request(server):
    assert fetched(server.uri("whole")) == CONTENT
    assert server.requests == ["/whole"]


def test_a_query_is_part_of_the_uri(server):
    assert fetched(server.uri("number?5&size=a%20b*")) == b"5&size=a%20b*"


def test_an_answer_in_pieces_is_put_together(server):
    assert fetched(server.uri("piecemeal")) == CONTENT


def test_follows_a_redirect(server):
    assert fetched(server.uri("moved")) == CONTENT


def test_many_come_back_in_order(server):
    uris = [server.uri(f"number?{number}") for number in range(2 * NUM_FETCHES + 3)]
    uris[5] = server.uri("missing")
    contents = list(fetch_all([uri.encode() for uri in uris], max_bytes=MAX_BYTES, policy=LOCAL))
    assert isinstance(contents.pop(5), FetchFailure)
    assert contents == [str(number).encode() for number in range(len(uris)) if number != 5]


def test_nothing_is_fetched_for_nothing():
    assert list(fetch_all([], max_bytes=MAX_BYTES, policy=LOCAL)) == []


def test_reading_stops_one_byte_beyond_the_bound(server):
    content = fetched(server.uri("endless?body"), max_bytes=150_000)
    assert isinstance(content, bytes)
    assert len(content) == 150_001
    assert server.stopped.wait(WAIT_SECONDS), "the server still sends"


@pytest.mark.parametrize(("excess", "num_bytes"), [(0, len(CONTENT)), (-1, len(CONTENT))])
def test_content_of_just_the_bound_is_whole(server, excess, num_bytes):
    content = fetched(server.uri("whole"), max_bytes=len(CONTENT) + excess)
    assert content == CONTENT[:num_bytes]


@pytest.mark.parametrize(("path", "reason"), [("missing", "HTTP 404"), ("broken", "HTTP 500")])
def test_an_error_of_the_server_is_a_failure(server, path, reason):
    assert reason in failure(server.uri(path))


def test_a_connection_that_breaks_off_is_a_failure_and_no_half_image(server):
    assert "ClientPayloadError" in failure(server.uri("cut"))


def test_nobody_listening_is_a_failure():
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
        assert "Connect" in failure(f"http://127.0.0.1:{port}/image.jpg")


@pytest.mark.parametrize("path", ["slow", "drip"])
def test_a_slow_server_hits_the_timeout(server, path, no_batch_limit):
    policy = FetchPolicy(allow=("127.0.0.1",), max_seconds=0.3)
    assert failure(server.uri(path), policy=policy) == "timeout: not there after 0.3 seconds"


def test_fetches_files(tmp_path):
    path = tmp_path / "a [1] image?.jpg"
    path.write_bytes(CONTENT)
    assert fetched(str(path)) == CONTENT
    assert fetched(f"file://{path}") == CONTENT
    assert fetched(str(path), max_bytes=10) == CONTENT[:11]
    assert "No such file" in failure(f"file://{tmp_path}/nothing.jpg")
    assert "directory" in failure(f"file://{tmp_path}")


def test_fetches_from_an_object_store():
    with s3_bucket() as bucket:
        fsspec.filesystem("s3").pipe_file(f"{bucket}/images/1.jpg", CONTENT)
        assert fetched(f"{bucket}/images/1.jpg") == CONTENT
        assert "FileNotFoundError" in failure(f"{bucket}/images/2.jpg")
        fsspec.filesystem("s3").pipe_file(f"{bucket}/images/empty.jpg", b"")
        assert fetched(f"{bucket}/images/empty.jpg") == b""
        assert fetched(f"{bucket}/images/1.jpg", max_bytes=10) == CONTENT[:11]
        assert "no object, but a directory" in failure(f"{bucket}/images")
        beside = FetchPolicy().beside(f"{bucket}/catalog")
        assert fetched(f"{bucket}/images/1.jpg", policy=beside) == CONTENT
        assert "s3: is not allowed" in refusal(f"{bucket}/images/1.jpg", policy=FetchPolicy())
        alias = bucket.replace("s3:", "S3A:")
        assert fetched(f"{alias}/images/1.jpg", policy=beside) == CONTENT
        elsewhere = FetchPolicy().beside("gs://bucket/catalog")
        assert "s3: is not allowed" in refusal(f"{bucket}/images/1.jpg", policy=elsewhere)


@pytest.fixture
def s3_endpoint(monkeypatch) -> Iterator[Callable[[str], None]]:
    """Says where the object store answers."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3fs.S3FileSystem.clear_instance_cache()
    yield lambda uri: monkeypatch.setenv("AWS_ENDPOINT_URL", uri)
    s3fs.S3FileSystem.clear_instance_cache()


def test_an_object_store_that_is_silent_hits_the_timeout(s3_endpoint, no_batch_limit):
    policy = FetchPolicy(allow=("s3:",), max_seconds=0.5)
    with socket.socket() as silent:  # who connects is not answered
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        s3_endpoint(f"http://127.0.0.1:{silent.getsockname()[1]}")
        found = failure("s3://bucket/image.jpg", policy=policy)
    assert found == "timeout: not there after 0.5 seconds"


def test_an_object_that_drips_hits_the_timeout(s3_endpoint, server, no_batch_limit):
    s3_endpoint(server.uri(""))
    policy = FetchPolicy(allow=("s3:",), max_seconds=1.5)
    for _ in range(20):
        found = failure("s3://drip/image.jpg", policy=policy)
        assert found == "timeout: not there after 1.5 seconds"
        if server.requests:  # the first time, its library may take as long to ask
            break
    assert server.requests


@pytest.mark.parametrize(
    "uri",
    [
        "nope://host/image.jpg",
        "http://",
        "http://[bad/image.jpg",
        "http://127.0.0.1:0/image.jpg",
        "http://127.0.0.1:65536/image.jpg",
        "http://127.0.0.1:-80/image.jpg",
        "file://\0",
        "data:",
        "github://image.jpg",
        "reference://image.jpg",
        "dir://image.jpg",
        f"zip://image.jpg::file://{__file__}",
        f"tar://image.jpg::file://{__file__}",
        "::",
    ],
)
def test_whatever_the_uri_a_failure_is_a_value(uri):
    failure(uri)


def test_no_file_is_read_unless_its_folder_was_named(tmp_path):
    (tmp_path / "images" / "more").mkdir(parents=True)
    inside, outside = tmp_path / "images" / "more" / "a.jpg", tmp_path / "secret.jpg"
    for path in (inside, outside):
        path.write_bytes(CONTENT)
    (tmp_path / "images" / "link.jpg").symlink_to(outside)
    (tmp_path / "images-of-others").symlink_to(tmp_path)
    (tmp_path / "way").symlink_to(tmp_path / "images")
    for uri in (str(inside), f"file://{inside}", f"FILE://{inside}", f"local://{inside}"):
        assert "name their folder with --fetch-allow" in refusal(uri, policy=FetchPolicy())
        # By a link, too: what counts is where it leads.
        for folder in (f"{tmp_path}/images/", f"file://{tmp_path}/images", f"{tmp_path}/way"):
            assert fetched(uri, policy=FetchPolicy(allow=(folder,))) == CONTENT
    policy = FetchPolicy(allow=(f"{tmp_path}/images",))
    for path in (
        "secret.jpg",
        "images/../secret.jpg",
        "images/link.jpg",
        "images-of-others/secret.jpg",
        "images/more/../../secret.jpg",
    ):
        assert "files are not allowed" in refusal(f"{tmp_path}/{path}", policy=policy)
        assert "files are not allowed" in refusal(f"file://{tmp_path}/{path}", policy=policy)
    assert refusal("images/more/a.jpg", policy=FetchPolicy(allow=("/data",)))


def test_a_pipe_or_a_device_is_no_file_and_keeps_nobody_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    assert "no file" in failure(str(tmp_path / "pipe.jpg"))
    assert "no file" in failure("/dev/zero")


@pytest.mark.parametrize(
    "uri",
    [
        "ftp://host/image.jpg",
        "data:image/gif;base64,R0lGODlhAQABAAAAACw=",
        "memory://image.jpg",
        "github://owner:repository@main/image.jpg",
        "simplecache::http://127.0.0.1/image.jpg",
        f"zip://image.jpg::file://{__file__}",
        f"filecache::file://{__file__}",
        " http://127.0.0.1/image.jpg",
        "gopher://127.0.0.1/image.jpg",
    ],
)
def test_other_schemes_are_refused_unless_named(uri):
    assert "not allowed" in refusal(uri, policy=FetchPolicy())


def test_a_named_scheme_opens_no_other_behind_it():
    policy = FetchPolicy(allow=("memory:", "zip:"))
    fsspec.filesystem("memory").pipe_file("/named/1.jpg", CONTENT)
    assert fetched("memory://named/1.jpg", policy=policy) == CONTENT
    chained = f"zip://image.jpg::file://{__file__}"
    assert "several schemes" in refusal(chained, policy=policy)


def test_what_failed_is_said_without_credentials(server):
    uri = server.uri("missing?X-Amz-Signature=51gn4tur3").replace("//", "//user:p4ssw0rd@")
    for found in (
        failure(uri),
        failure("nope://user:p4ssw0rd@host/a?token=51gn4tur3"),
        failure("http://user:p4ssw0rd@[bad/a?token=51gn4tur3"),
    ):
        assert "p4ssw0rd" not in found
        assert "51gn4tur3" not in found
