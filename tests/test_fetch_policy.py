"""Tests of pipelines/fetching/fetch_policy.py: spelling, hosts, addresses."""

import pickle

import pytest

from pipelines.fetching.fetch_policy import FetchPolicy, FetchRefusedError, scheme_of

PUBLIC = (
    *("93.184.215.14", "8.8.8.8", "1.1.1.1", "100.128.0.1", "172.32.0.1", "192.167.255.255"),
    *("2606:4700:4700::1111", "::ffff:8.8.8.8", "64:ff9b::8.8.8.8"),
)
INSIDE = {
    "loopback": ("127.0.0.1", "127.255.255.254", "::1"),
    "private": ("10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1", "fd00:ec2::254"),
    "link-local": ("169.254.169.254", "169.254.0.1", "fe80::1", "fe80::1%eth0", "fec0::1"),
    "shared": ("100.64.0.1", "100.100.100.200", "100.127.255.255"),
    "unspecified": ("0.0.0.0", "0.1.2.3", "::"),
    "multicast": ("224.0.0.1", "239.255.255.255", "ff02::1", "ff0e::1"),
    "reserved": ("240.0.0.1", "255.255.255.255", "192.0.0.192", "198.18.0.1", "2001:db8::1"),
    "of the platform": ("168.63.129.16",),
    "within another": (
        *("::ffff:127.0.0.1", "::ffff:169.254.169.254", "::ffff:a00:1", "::127.0.0.1"),
        *("64:ff9b::10.0.0.1", "64:ff9b:1::8.8.8.8", "2002:7f00:1::", "2002:a9fe:a9fe::1"),
    ),
    "none": ("127.1", "2130706433", "0x7f.0.0.1", "017700000001", "localhost", ""),
}


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses_are_allowed(address: str):
    FetchPolicy().check_address(address)


@pytest.mark.parametrize("address", [address for found in INSIDE.values() for address in found])
def test_others_are_not_unless_their_network_was_named(address: str):
    with pytest.raises(FetchRefusedError):
        FetchPolicy(allow=("192.0.2.0/24", "s3:", "images.internal")).check_address(address)


@pytest.mark.parametrize(
    ("word", "inside", "outside"),
    [
        ("10.1.0.0/16", "10.1.2.3", "10.2.0.1"),
        ("10.1.0.0/16", "::ffff:10.1.2.3", "::ffff:10.2.0.1"),
        ("127.0.0.1", "127.0.0.1", "127.0.0.2"),
        ("[::1]", "::1", "fe80::1"),
        ("fd00::/8", "fd00::7", "fe80::1"),
    ],
)
def test_a_named_network_is_allowed_and_no_other(word: str, inside: str, outside: str):
    policy = FetchPolicy(allow=(word,))
    policy.check_address(inside)
    policy.check_address("8.8.8.8")
    with pytest.raises(FetchRefusedError, match="name its host or network with --fetch-allow"):
        policy.check_address(outside)


def test_only_a_host_that_was_named_may_be_anywhere():
    policy = FetchPolicy(allow=("images.internal", "*.Corp.Example"))
    for host in ("images.internal", "IMAGES.internal.", "a.corp.example", "a.b.corp.example"):
        assert policy.trusts(host)
    for host in ("internal", "x.images.internal", "corp.example", "evilcorp.example", "a.corp"):
        assert not policy.trusts(host)


def test_hosts_can_be_limited():
    policy = FetchPolicy(hosts=("*.acme.com", "acme.com"), allow=("images.internal",))
    for host in ("cdn.acme.com", "acme.com.", "ACME.com", "images.internal"):
        policy.check_host(host)
    for host in ("acme.com.evil.example", "evilacme.com", "8.8.8.8", ""):
        with pytest.raises(FetchRefusedError, match="is not among --fetch-hosts"):
            policy.check_host(host)
    # To be among them is not to be at any address.
    assert not policy.trusts("cdn.acme.com")
    FetchPolicy().check_host("anything.example")


@pytest.mark.parametrize(
    ("catalog_uri", "scheme"),
    [
        ("s3://bucket/catalog", "s3"),
        ("GS://bucket/catalog", "gs"),
        ("abfs://container@account.dfs.core.windows.net/a", "abfs"),
    ],
)
def test_the_catalogs_object_store_is_allowed_and_no_other(catalog_uri: str, scheme: str):
    policy = FetchPolicy().beside(catalog_uri)
    for allowed in (scheme, "https", "http"):
        policy.check_scheme(allowed)
    for other in {"s3", "gs", "abfs", "ftp", "file", "data"} - {scheme}:
        with pytest.raises(FetchRefusedError, match=f"name it with --fetch-allow {other}:"):
            policy.check_scheme(other)
    with pytest.raises(FetchRefusedError):
        policy.beside("catalog").check_scheme(scheme)


@pytest.mark.parametrize(
    "names", [("s3", "s3a"), ("gs", "gcs"), ("abfs", "abfss", "az"), ("oci", "ocilake")]
)
def test_a_store_by_another_of_its_names_is_the_same_store(names: tuple[str, ...]):
    others = {"s3", "gs", "abfs", "adl", "oci", "hf", "ftp", "file"} - set(names)
    for one in names:
        for policy in (FetchPolicy(allow=(f"{one}:",)), FetchPolicy().beside(f"{one}://bucket/a")):
            for another in names:
                policy.check_scheme(another)
            for other in others:
                with pytest.raises(FetchRefusedError):
                    policy.check_scheme(other)


@pytest.mark.parametrize("catalog_uri", ["file:///catalog", "/catalog", "catalog", "ftp://host/a"])
def test_a_catalog_elsewhere_opens_nothing(catalog_uri: str):
    policy = FetchPolicy().beside(catalog_uri)
    assert policy == FetchPolicy()
    with pytest.raises(FetchRefusedError):
        policy.check_path("/catalog/1.jpg")


def test_folders_are_told_by_whole_names(tmp_path):
    policy = FetchPolicy(allow=(f"{tmp_path}/images",))
    policy.check_path(f"{tmp_path}/images/a/b.jpg")
    for path in (f"{tmp_path}/images2/a.jpg", f"{tmp_path}/a.jpg", "/etc/passwd"):
        with pytest.raises(FetchRefusedError):
            policy.check_path(path)
    FetchPolicy(allow=("/",)).check_path("/anything")
    FetchPolicy(allow=("file:",)).check_path("/anything")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"allow": ("*",)}, r"fetch_allow='\*'"),
        ({"allow": ("10.*",)}, r"fetch_allow='10\.\*'.*expected a network such as 10\.0\.0\.0/8"),
        ({"allow": ("10.1.2.3/8",)}, "has host bits set"),
        ({"allow": ("300.0.0.1",)}, r"fetch_allow='300\.0\.0\.1'"),
        ({"allow": ("s3://bucket",)}, r"a scheme with its colon \(s3:\)"),
        ({"allow": ("images/here",)}, "expected a network"),
        ({"allow": ("two words",)}, "expected a host"),
        ({"allow": ("",)}, "expected a host"),
        ({"allow": ("https://images.internal",)}, "expected a host"),
        ({"allow": ("nope:",)}, "no such scheme"),
        ({"hosts": ("https://acme.com",)}, r"fetch_hosts='https://acme\.com'"),
        ({"max_seconds": 0}, "max_fetch_seconds=0: expected more than 0"),
        ({"max_redirects": -1}, "max_redirects=-1: expected at least 0"),
    ],
)
def test_what_cannot_be_meant_is_refused(options: dict, says: str):
    with pytest.raises(ValueError, match=says):
        FetchPolicy(**options)


def test_it_travels_to_workers():
    policy = FetchPolicy(allow=("10.0.0.0/8", "s3:"), hosts=("*.acme.com",)).beside("s3://a/b")
    assert pickle.loads(pickle.dumps(policy)) == policy
    assert len(pickle.dumps(policy)) < 500


@pytest.mark.parametrize(
    ("uri", "scheme"),
    [
        ("HTTPS://host/a", "https"),
        ("/data/a.jpg", "file"),
        ("a.jpg", "file"),
        ("simplecache::https://host/a", "simplecache"),
        ("::https://host/a", "file"),
        (" https://host/a", "file"),
        ("data:,a", "data"),
    ],
)
def test_a_scheme_is_what_stands_first(uri: str, scheme: str):
    assert scheme_of(uri) == scheme


def test_a_refusal_is_no_error_of_the_system():
    refused = pickle.loads(pickle.dumps(FetchRefusedError("host a is not among --fetch-hosts")))
    assert (refused.errno, refused.detail) == (None, "host a is not among --fetch-hosts")
    assert not isinstance(refused, PermissionError)
