"""Tests of pipelines/fetch.py against an HTTP server and an S3 server on this machine."""

import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import aiohttp
import fsspec
import pytest

from pipelines import fetch
from pipelines.fetch import FETCH_THREADS, FetchFailure, fetch_all
from tests.object_store import s3_bucket

CONTENT = bytes(range(256)) * 400
MAX_BYTES = 1_000_000


class Handler(BaseHTTPRequestHandler):
    """Answers by path; the server notes what was asked and when an endless answer ended."""

    server: "ImageServer"

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        name = self.path.partition("?")[0].strip("/")
        getattr(self, f"send_{name}", self.send_missing)()

    def send_whole(self) -> None:
        self.start(length=len(CONTENT))
        self.wfile.write(CONTENT)

    def send_number(self) -> None:
        number = self.path.partition("?")[2]
        time.sleep(0.1 if number == "0" else 0)  # the first answer comes last
        self.start(length=len(number))
        self.wfile.write(number.encode())

    def send_piecemeal(self) -> None:
        self.start(length=None)
        for first in range(0, len(CONTENT), 30_000):
            self.wfile.write(CONTENT[first : first + 30_000])
            self.wfile.flush()
            time.sleep(0.02)

    def send_endless(self) -> None:
        self.start(length=None)
        try:
            while True:
                self.wfile.write(CONTENT)
        except OSError:
            self.server.stopped.set()

    def send_cut(self) -> None:
        self.start(length=len(CONTENT))
        self.wfile.write(CONTENT[:1000])

    def send_slow(self) -> None:
        self.start(length=len(CONTENT))
        self.wfile.write(CONTENT[:1000])
        self.wfile.flush()
        self.server.stopped.wait(10)

    def send_moved(self) -> None:
        self.send_response(302)
        self.send_header("Location", "/whole")
        self.end_headers()

    def send_broken(self) -> None:
        self.send_error(500)

    def send_missing(self) -> None:
        self.send_error(404)

    def start(self, *, length: int | None) -> None:
        self.send_response(200)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


class ImageServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[str] = []
        self.stopped = threading.Event()

    def uri(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{path}"


@pytest.fixture
def server() -> Iterator[ImageServer]:
    with ImageServer() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield server
        server.stopped.set()
        server.shutdown()
        thread.join()


def fetched(uri: str, *, max_bytes: int = MAX_BYTES) -> bytes | FetchFailure:
    (content,) = fetch_all([uri.encode()], max_bytes=max_bytes)
    return content


def failure(uri: str) -> str:
    content = fetched(uri)
    assert isinstance(content, FetchFailure), content
    assert 0 < len(content.detail) <= 200
    assert "\n" not in content.detail
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
    uris = [server.uri(f"number?{number}") for number in range(2 * FETCH_THREADS + 3)]
    uris[5] = server.uri("missing")
    contents = fetch_all([uri.encode() for uri in uris], max_bytes=MAX_BYTES)
    assert isinstance(contents.pop(5), FetchFailure)
    assert contents == [str(number).encode() for number in range(len(uris)) if number != 5]


def test_nothing_is_fetched_for_nothing():
    assert fetch_all([], max_bytes=MAX_BYTES) == []


def test_reading_stops_one_byte_beyond_the_bound(server):
    content = fetched(server.uri("endless"), max_bytes=150_000)
    assert isinstance(content, bytes)
    assert len(content) == 150_001
    assert server.stopped.wait(10), "the server still sends"


@pytest.mark.parametrize(("excess", "num_bytes"), [(0, len(CONTENT)), (-1, len(CONTENT))])
def test_content_of_just_the_bound_is_whole(server, excess, num_bytes):
    content = fetched(server.uri("whole"), max_bytes=len(CONTENT) + excess)
    assert content == CONTENT[:num_bytes]


@pytest.mark.parametrize(("path", "reason"), [("missing", "missing"), ("broken", "500")])
def test_an_error_of_the_server_is_a_failure(server, path, reason):
    assert reason in failure(server.uri(path))


def test_a_connection_that_breaks_off_is_a_failure_and_no_half_image(server):
    assert "ClientPayloadError" in failure(server.uri("cut"))


def test_nobody_listening_is_a_failure():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    assert "Connect" in failure(f"http://127.0.0.1:{port}/image.jpg")


def test_a_slow_server_hits_the_timeout(server, monkeypatch):
    assert fetch._HTTP_OPTIONS["client_kwargs"]["timeout"].total == fetch.FETCH_TIMEOUT_SECONDS
    timeout = aiohttp.ClientTimeout(total=0.3)
    monkeypatch.setattr(fetch, "_HTTP_OPTIONS", {"client_kwargs": {"timeout": timeout}})
    started = time.monotonic()
    assert "Timeout" in failure(server.uri("slow"))
    assert time.monotonic() - started < 5


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


@pytest.mark.parametrize(
    "uri",
    [
        "nope://host/image.jpg",
        "http://",
        "http://[bad/image.jpg",
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
