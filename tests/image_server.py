"""An HTTP server on this machine that answers well, badly, or by leading elsewhere."""

import gzip
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

CONTENT = bytes(range(256)) * 400
BIG_BYTES = 400_000
# How an answer begins that never ends, and with what it goes on.
ENDLESS = {
    "body": (b"HTTP/1.1 200 OK\r\n\r\n", CONTENT),
    "chunk": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3;a=", b"a" * 10_000),
    "header": (b"HTTP/1.1 200 OK\r\nX-More: ", b"a" * 10_000),
    "headers": (b"HTTP/1.1 200 OK\r\n", b"X-More: 1\r\n" * 1000),
    "hints": (b"", b"HTTP/1.1 103 Early Hints\r\n\r\n" * 100),
    "redirect": (b"HTTP/1.1 302 Found\r\nLocation: /missing\r\n\r\n", CONTENT),
    "trailers": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n",
        b"X-More: 1\r\n" * 1000,
    ),
}


class Handler(BaseHTTPRequestHandler):
    """Answers by path; the server notes what was asked and when an endless answer ended."""

    server: "ImageServer"
    protocol_version = "HTTP/1.1"  # of which connections are kept

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        self.server.headers.append(dict(self.headers))
        self.server.clients.append(self.client_address)
        name = self.path.partition("?")[0].strip("/").partition("/")[0]
        getattr(self, f"send_{name}", self.send_missing)()

    def do_HEAD(self) -> None:
        """As an object store describes one that it has; what GET gives is another matter."""
        self.start(length=len(CONTENT))

    @property
    def query(self) -> str:
        return unquote(self.path.partition("?")[2])

    def send_whole(self) -> None:
        self.start(length=len(CONTENT), is_kept=True)
        self.wfile.write(CONTENT)

    def send_number(self) -> None:
        number = self.path.partition("?")[2]
        time.sleep(0.1 if number == "0" else 0)  # the first answer comes last
        self.start(length=len(number))
        self.wfile.write(number.encode())

    def send_big(self) -> None:
        """`number`, or `number,unsaid` without a length: BIG_BYTES of that byte."""
        number, _, unsaid = self.query.partition(",")
        self.start(length=None if unsaid else BIG_BYTES)
        with suppress(OSError):  # who has no room for it hangs up, and asks again
            self.wfile.write(bytes([int(number)]) * BIG_BYTES)

    def send_piecemeal(self) -> None:
        self.start(length=None)
        with suppress(OSError):  # who waits no more hangs up
            for first in range(0, len(CONTENT), 30_000):
                self.wfile.write(CONTENT[first : first + 30_000])
                self.wfile.flush()
                time.sleep(0.02)

    def send_endless(self) -> None:
        """An answer without end, of the sort that its query says."""
        start, more = ENDLESS[self.query]
        self.close_connection = True
        try:
            self.wfile.write(start)
            while True:
                self.wfile.write(more)
        except OSError:
            self.server.stopped.set()

    def send_cut(self) -> None:
        self.start(length=len(CONTENT))
        self.wfile.write(CONTENT[:1000])

    def send_slow(self) -> None:
        self.start(length=len(CONTENT))
        self.wfile.write(CONTENT[:1000])
        self.wfile.flush()
        self.server.stopped.wait()

    def send_drip(self) -> None:
        """A byte now and then, so that no single read takes long."""
        self.start(length=len(CONTENT))
        try:
            while not self.server.stopped.wait(0.02):
                self.wfile.write(b".")
                self.wfile.flush()
        except OSError:
            self.server.left.append(self.path)

    def send_compressed(self) -> None:
        body = gzip.compress(bytes(10_000_000))
        self.send_response(200)
        self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def send_moved(self) -> None:
        self.redirect("/whole")

    def send_to(self) -> None:
        """Redirects to what its query says."""
        self.redirect(self.query)

    def send_further(self) -> None:
        """As many redirects as its query says, and then an image."""
        left = int(self.query)
        self.redirect(f"/further?{left - 1}" if left > 1 else "/whole")

    def send_broken(self) -> None:
        self.send_error(500)

    def send_missing(self) -> None:
        self.send_error(404)

    def redirect(self, location: str) -> None:
        self.send_response(302)
        self.send_header("Location", location)
        self.send_header("Set-Cookie", "visited=1")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def start(self, *, length: int | None, is_kept: bool = False) -> None:
        self.send_response(200)
        self.send_header("Connection", "keep-alive" if is_kept else "close")
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


class ImageServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, address: str) -> None:
        super().__init__((address, 0), Handler)
        self.address = address
        self.requests: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.clients: list[tuple[str, int]] = []
        self.left: list[str] = []
        """Drips that were not waited for."""
        self.stopped = threading.Event()

    def uri(self, path: str, *, host: str | None = None) -> str:
        return f"http://{host or self.address}:{self.server_port}/{path}"


@contextmanager
def image_server(
    address: str = "127.0.0.1", *, tls: ssl.SSLContext | None = None
) -> Iterator[ImageServer]:
    """One that listens at an address of this machine."""
    with ImageServer(address) as server:
        if tls is not None:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield server
        server.stopped.set()
        server.shutdown()
        thread.join()
