"""An S3 server on this machine, for tests of what object stores do otherwise than disks."""

import logging
import random
import socket
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import pytest
import s3fs
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server


class OneAtATime:
    """Answers one request after another: S3 looks and writes in one step, moto alone does not."""

    def __init__(self, app: Callable[..., Iterable[bytes]]) -> None:
        self._app = app
        self._lock = threading.Lock()

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        with self._lock:
            return self._app(environ, start_response)


Fault = Literal["slow down", "internal error", "lost before", "lost after", "cut short"]
FAULTS: tuple[Fault, ...] = get_args(Fault)
# As S3 words them: https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html
REFUSALS = {
    "slow down": ("503 Slow Down", "SlowDown", "Please reduce your request rate."),
    "internal error": (
        "500 Internal Server Error",
        "InternalError",
        "We encountered an internal error. Please try again.",
    ),
    "access denied": ("403 Forbidden", "AccessDenied", "Access Denied"),
}


class Unreliable:
    """Lets some requests fail, in the ways in which those to an object store do.

    Which of them is by lot, seeded; which request that is depends on the order in which threads and
    processes come.
    """

    def __init__(self, app: Callable[..., Iterable[bytes]], *, seed: int) -> None:
        self._app = app
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self.share = 0.0
        """Of the requests that fail."""
        self.planned: Callable[[str, str], str | None] = lambda method, path: None
        """Method, path -> of FAULTS or REFUSALS, what happens to this request; None: by lot."""
        self.num_requests = 0
        self.num_bytes = 0
        """Of bodies that were sent, those of faults left out."""
        self.num_faults = dict.fromkeys(FAULTS, 0)

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        fault = self.planned(environ["REQUEST_METHOD"], environ["PATH_INFO"]) or self._fault()
        if fault in REFUSALS:
            return _refuse(fault, environ, start_response)
        if fault == "lost before":
            _read_body(environ)
            return _hang_up(environ)
        answer = list(self._app(environ, start_response))
        if fault == "lost after":
            return _hang_up(environ)
        if fault == "cut short":
            return _cut_short(answer, environ)
        with self._lock:
            self.num_bytes += sum(map(len, answer))
        return answer

    def _fault(self) -> str | None:
        with self._lock:
            self.num_requests += 1
            if self._random.random() >= self.share:
                return None
            fault: Fault = self._random.choice(FAULTS)
            self.num_faults[fault] += 1
            return fault


def _read_body(environ: dict[str, Any]) -> None:
    """What is not read would be taken for the connection's next request."""
    environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))


def _refuse(refusal: str, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    status, code, message = REFUSALS[refusal]
    _read_body(environ)
    body = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
    start_response(status, [("Content-Type", "text/xml"), ("Content-Length", str(len(body)))])
    return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]


def _hang_up(environ: dict[str, Any]) -> Iterable[bytes]:
    environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
    raise ConnectionAbortedError


def _cut_short(answer: Iterable[bytes], environ: dict[str, Any]) -> Iterator[bytes]:
    """Half of what was announced; of nothing, not even that."""
    body = b"".join(answer)
    yield body[: len(body) // 2]
    environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
    raise ConnectionAbortedError


@contextmanager
def s3_bucket() -> Iterator[str]:
    """The URI of an empty bucket, which s3fs reads without further options."""
    with unreliable_bucket(seed=0) as (uri, _):
        yield uri


@contextmanager
def unreliable_bucket(*, seed: int) -> Iterator[tuple[str, Unreliable]]:
    """An empty bucket, and what lets its requests fail as soon as it is told to."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # else a line for each request
    app = Unreliable(OneAtATime(DomainDispatcherApplication(create_backend_app)), seed=seed)
    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        s3fs.S3FileSystem.clear_instance_cache()
        bucket = f"bucket-{uuid.uuid4().hex}"  # moto forgets nothing while the process lives
        s3fs.S3FileSystem().mkdir(bucket)
        try:
            yield f"s3://{bucket}", app
        finally:
            s3fs.S3FileSystem.clear_instance_cache()
            server.shutdown()
            thread.join()
            server.server_close()
