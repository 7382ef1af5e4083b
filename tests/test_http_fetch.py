"""Tests of pipelines/fetching/http_fetch.py: what tries to reach a server that is not allowed.

Two servers are on this machine: one at 127.0.0.1, which is forbidden, and one at 127.0.0.2.
"""

import errno
import socket
import ssl
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from pipelines.fetching.fetch import FetchFailure, fetch_all
from pipelines.fetching.fetch_policy import FetchPolicy
from tests.image_server import CONTENT, ImageServer, image_server
from tests.waiting import WAIT_SECONDS

ALLOW = FetchPolicy(allow=("127.0.0.2",))
GETADDRINFO = socket.getaddrinfo


@pytest.fixture
def forbidden() -> Iterator[ImageServer]:
    with image_server("127.0.0.1") as server:
        yield server


@pytest.fixture
def allowed() -> Iterator[ImageServer]:
    with image_server("127.0.0.2") as server:
        yield server


def fetched(uri: str, policy: FetchPolicy = ALLOW) -> bytes | FetchFailure:
    (content,) = fetch_all([uri.encode()], max_bytes=1_000_000, policy=policy)
    return content


def reason(uri: str, policy: FetchPolicy = ALLOW) -> str:
    content = fetched(uri, policy)
    assert isinstance(content, FetchFailure), content
    return f"{content.reason}: {content.detail}"


def use_names(monkeypatch: pytest.MonkeyPatch, names: dict[str, list[list[str]]]) -> None:
    """Names -> the addresses of each answer to who asks for them; the last one stays."""

    def getaddrinfo(host: Any, port: Any, *args: Any, **options: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else host
        if name not in names:
            return GETADDRINFO(host, port, *args, **options)
        answers = names[name]
        addresses = answers.pop(0) if len(answers) > 1 else answers[0]
        return [found for one in addresses for found in GETADDRINFO(one, port, *args, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


def test_what_is_allowed_is_fetched(allowed: ImageServer):
    assert fetched(allowed.uri("whole")) == CONTENT
    assert fetched(allowed.uri("moved")) == CONTENT


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "localhost", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "0.0.0.0", "[::]"),
        *("127.0.0.1.", "user@127.0.0.1", "127.0.0.2@127.0.0.1", "127.0.0.2:80@127.0.0.1"),
        *("2130706433", "0x7f.0.0.1", "0x7f000001", "0177.0.0.1", "127.1", "127.0.1"),
        *("①②⑦.⓪.⓪.①", "127。0。0。1", "%31%32%37.0.0.1", "127.0.0.2\\@127.0.0.1"),
    ],
)
def test_no_spelling_of_a_host_gets_through(forbidden: ImageServer, host: str):
    for policy in (FetchPolicy(), ALLOW):
        reason(forbidden.uri("whole", host=host), policy)
    assert forbidden.requests == []


def test_link_local_addresses_are_refused_without_a_try():
    for policy in (FetchPolicy(), ALLOW):
        for host in ("169.254.169.254", "[fe80::1]", "[::ffff:169.254.169.254]", "[fd00:ec2::254]"):
            found = reason(f"http://{host}/latest/meta-data/", policy)
            assert found.startswith("fetch_refused: ")
            assert "no public address; if it is meant, name its host or network" in found


def test_a_name_is_judged_by_the_address_it_leads_to(forbidden: ImageServer, monkeypatch):
    use_names(monkeypatch, {"images.example": [["127.0.0.1"]]})
    found = reason(forbidden.uri("whole", host="images.example"))
    assert found.startswith("fetch_refused: host images.example: 127.0.0.1 is no public address")
    assert forbidden.requests == []
    # Once it is named it may be there, and what it redirects to is judged anew.
    policy = FetchPolicy(allow=("images.example",))
    assert fetched(forbidden.uri("whole", host="images.example"), policy) == CONTENT
    num_requests = len(forbidden.requests)
    location = forbidden.uri("whole")
    found = reason(forbidden.uri(f"to?{location}", host="images.example"), policy)
    assert found.startswith("fetch_refused: host 127.0.0.1: ")
    assert len(forbidden.requests) == num_requests + 1
    # Nor do the connections that are kept to it serve another name that leads there.
    use_names(monkeypatch, {"others.example": [["127.0.0.1"]]})
    assert reason(forbidden.uri("whole", host="others.example"), policy).startswith("fetch_refused")
    assert fetched(forbidden.uri("whole", host="images.example"), policy) == CONTENT
    assert len(forbidden.requests) == num_requests + 2
    assert forbidden.clients[0] == forbidden.clients[-1]


def test_a_name_that_leads_elsewhere_the_next_time_gains_nothing(
    forbidden: ImageServer, allowed: ImageServer, monkeypatch
):
    use_names(monkeypatch, {"rebinding.example": [["127.0.0.2"], ["127.0.0.1"]]})
    assert fetched(allowed.uri("whole", host="rebinding.example")) == CONTENT
    assert reason(forbidden.uri("whole", host="rebinding.example")).startswith("fetch_refused")
    assert forbidden.requests == []


def test_of_several_addresses_only_those_allowed_are_connected_to(
    forbidden: ImageServer, allowed: ImageServer, monkeypatch
):
    names = {"both.example": [["127.0.0.1", "127.0.0.2"]], "inside.example": [["127.0.0.1", "::1"]]}
    use_names(monkeypatch, names)
    assert fetched(allowed.uri("whole", host="both.example")) == CONTENT
    reason(forbidden.uri("whole", host="both.example"))
    assert reason(forbidden.uri("whole", host="inside.example")).startswith("fetch_refused")
    assert forbidden.requests == []


@pytest.mark.parametrize(
    ("location", "says"),
    [
        ("http://127.0.0.1:{port}/whole", "fetch_refused: host 127.0.0.1: "),
        ("//127.0.0.1:{port}/whole", "fetch_refused: host 127.0.0.1: "),
        ("http://localhost:{port}/whole", "fetch_refused: host localhost: "),
        ("http://169.254.169.254/latest/meta-data/", "fetch_refused: host 169.254.169.254: "),
        ("file:///etc/passwd", "fetch_refused: a redirect to file: is not followed"),
        ("s3://bucket/key", "fetch_refused: a redirect to s3: is not followed"),
        ("data:,x", "fetch_refused: a redirect to data: is not followed"),
        ("", "fetch_failed: more than 5 redirects"),
    ],
)
def test_redirects_are_checked_again(
    forbidden: ImageServer, allowed: ImageServer, location: str, says: str
):
    location = location.format(port=forbidden.server_port)
    policy = FetchPolicy(allow=("127.0.0.2", "file:", "s3:", "data:"))
    assert reason(allowed.uri(f"to?{location}"), policy).startswith(says)
    assert forbidden.requests == []


def test_redirects_are_few():
    with image_server("127.0.0.2") as server:
        policy = FetchPolicy(allow=("127.0.0.2",), max_redirects=2)
        assert fetched(server.uri("further?2"), policy) == CONTENT
        assert reason(server.uri("further?3"), policy) == "fetch_failed: more than 2 redirects"
        assert len(server.requests) == 3 + 3
        none = FetchPolicy(allow=("127.0.0.2",), max_redirects=0)
        assert fetched(server.uri("whole"), none) == CONTENT
        assert reason(server.uri("moved"), none) == "fetch_failed: more than 0 redirects"


def test_hosts_that_are_not_named_are_not_asked_for(allowed: ImageServer, monkeypatch):
    use_names(monkeypatch, {"cdn.acme.example": [["127.0.0.2"]], "evil.example": [["127.0.0.2"]]})
    policy = FetchPolicy(allow=("127.0.0.2/32",), hosts=("*.acme.example",))
    assert fetched(allowed.uri("whole", host="cdn.acme.example"), policy) == CONTENT
    for host in ("evil.example", "127.0.0.2"):
        found = reason(allowed.uri("whole", host=host), policy)
        assert found == f"fetch_refused: host {host} is not among --fetch-hosts"
    location = allowed.uri("whole", host="evil.example")
    found = reason(allowed.uri(f"to?{location}", host="cdn.acme.example"), policy)
    assert found == "fetch_refused: host evil.example is not among --fetch-hosts"
    assert len(allowed.requests) == 2


def test_no_server_hears_what_is_meant_for_another(allowed: ImageServer, monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text("machine 127.0.0.2 login user password s3cret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    fetched(allowed.uri("whole").replace("//", "//user:s3cret@"))
    with image_server("127.0.0.2") as other:
        uri = allowed.uri(f"to?{other.uri('whole')}").replace("//", "//user:s3cret@", 1)
        assert fetched(uri) == CONTENT
        assert fetched(other.uri("whole")) == CONTENT
        assert len(other.headers) == 2
        for headers in other.headers:
            assert not {"authorization", "cookie", "referer"} & {name.lower() for name in headers}


def test_what_grows_when_it_is_unpacked_is_not_unpacked(allowed: ImageServer):
    assert reason(allowed.uri("compressed")) == (
        "fetch_failed: the server compressed it (gzip), unasked"
    )
    assert allowed.headers[0]["Accept-Encoding"] == "identity"


@pytest.mark.parametrize(
    ("sort", "says"),
    [
        ("chunk", "timeout: not there after 0.5 seconds"),
        ("header", "Got more than 8190 bytes"),
        ("headers", "Too many headers"),
        ("hints", "timeout: not there after 0.5 seconds"),
        ("redirect", "HTTP 404"),
        ("trailers", "Too many headers"),
    ],
)
def test_no_part_of_an_answer_goes_on_for_ever(
    allowed: ImageServer, no_batch_limit: None, sort: str, says: str
):
    seconds = 0.5 if says.startswith("timeout") else 60.0
    policy = FetchPolicy(allow=("127.0.0.2",), max_seconds=seconds)
    assert says in reason(allowed.uri(f"endless?{sort}"), policy)
    assert allowed.stopped.wait(WAIT_SECONDS), "the server still sends"


@pytest.mark.parametrize("more", ["\r\nX-More: 1\r\n", "%0d%0aX-More:%201", " HTTP/1.1\nX-More: 1"])
def test_no_uri_writes_a_header(allowed: ImageServer, more: str):
    for uri in (allowed.uri(f"whole?{more}"), allowed.uri("whole").replace("//", f"//{more}@")):
        fetched(uri)
    assert allowed.requests
    assert all("X-More" not in headers for headers in allowed.headers)


def test_who_cannot_prove_its_name_is_not_heard(tmp_path: Path):
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.2")])
    address = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.2"))])
    now = datetime.now(UTC)
    made = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    made = made.not_valid_before(now - timedelta(1)).not_valid_after(now + timedelta(1))
    certificate = made.add_extension(address, critical=False).sign(key, hashes.SHA256())
    (tmp_path / "both.pem").write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        + certificate.public_bytes(Encoding.PEM)
    )
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(tmp_path / "both.pem")
    with image_server("127.0.0.2", tls=tls) as server:
        found = reason(server.uri("whole").replace("http:", "https:"))
        assert "certificate verify failed: self-signed certificate" in found
        assert server.requests == []


class ForbiddenSocket(socket.socket):
    """As where the system, by a rule of its own, lets nobody connect."""

    def connect(self, address: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")


def test_what_the_system_does_not_permit_is_no_refusal_of_ours(allowed: ImageServer, monkeypatch):
    monkeypatch.setattr(socket, "socket", ForbiddenSocket)
    use_names(monkeypatch, {"both.example": [["127.0.0.1", "127.0.0.2"]]})
    for host in ("127.0.0.2", "both.example"):
        found = reason(allowed.uri("whole", host=host))
        assert found.startswith("fetch_failed: ClientConnectorError")
    assert reason(allowed.uri("whole", host="127.0.0.1")).startswith(
        "fetch_refused: host 127.0.0.1"
    )


def test_several_addresses_that_are_refused_are_a_refusal(monkeypatch):
    use_names(monkeypatch, {"inside.example": [["127.0.0.1", "10.0.0.1", "::1"]]})
    found = reason("http://inside.example/whole")
    assert found.startswith("fetch_refused: host inside.example: ")
    assert "is no public address" in found
