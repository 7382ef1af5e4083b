"""`clipmill serve`: an HTTP API and a page over a store's index, until it is stopped.

Knows nothing of HTTP; the service is in `jobs.serving`.
"""

import contextlib
import ipaddress
import os
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from engine.errors import ClipmillError
from engine.registry import default_engines_uri
from jobs.cluster import ray_cluster
from jobs.command import CommandParser, print_result, run
from jobs.fetch_options import add_fetch_options, fetch_policy_from
from jobs.serving.live import open_current
from jobs.serving.options import ServiceConfig, ServiceLimits
from pipelines.schema import MODALITIES

TOKEN_VARIABLE = "CLIPMILL_TOKEN"
DEFAULT_PORT = 8000


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    options = _parser().parse_options(argv)
    limits = ServiceLimits(
        max_body_bytes=options.max_body_bytes,
        max_hits=options.max_hits,
        max_queries=options.max_queries,
        max_image_bytes=options.max_image_bytes,
        max_image_pixels=options.max_image_pixels,
        max_seconds=options.max_seconds,
        max_concurrent=options.max_concurrent,
    )
    token = _token(options.token_file)
    config = ServiceConfig(
        store_uri=_absolute(options.store),
        engines_uri=_absolute(options.engines),
        among=(options.among,) if options.among else None,
        refresh_seconds=options.refresh_seconds,
        thumbnails=not options.no_thumbnails,
        fetch=fetch_policy_from(options),
        token=token,
        hosts=_hosts(options.host) if token is None else None,
        limits=limits,
    )
    if options.replicas < 1:
        raise ValueError(f"--replicas {options.replicas}: expected at least 1")
    if not 0 < options.port < 2**16:
        raise ValueError(f"--port {options.port}: expected 1 to 65535")
    is_own_cluster = not (options.address or os.environ.get("RAY_ADDRESS"))
    # On a cluster of others, it is the port of another machine, or what Ray Serve has there.
    if is_own_cluster:
        _check_is_free(options.host, options.port)
        # From HTTP to the replicas by gRPC and not as actor tasks, which cost twice as much; Ray
        # Serve reads it in the processes that Ray starts, and listens for both in any case.
        os.environ.setdefault("RAY_SERVE_USE_GRPC_BY_DEFAULT", "1")
    # Here and not in a replica first: what is wrong with the store or its engine is said at once.
    opened = open_current(config)
    number, modalities = opened.snapshot.number, ", ".join(opened.searchers)
    del opened
    # Imported only now: what is wrong so far is said without a wait for it.
    from jobs.serving.deployment import check_place, deploy, take_down

    result_stream = sys.stdout
    # Ray prints of its own, on stdout, where only the result belongs.
    with contextlib.redirect_stdout(sys.stderr), ray_cluster(options.address):
        stop = threading.Event()
        # After Ray has set its own, which end the process where it stands.
        for wanted in (signal.SIGINT, signal.SIGTERM):
            signal.signal(wanted, lambda *_: stop.set())
        check_place(host=options.host, port=options.port)
        try:
            url = deploy(
                config, host=options.host, port=options.port, num_replicas=options.replicas
            )
            text = f"{url} answers from snapshot {number} ({modalities}); Ctrl-C ends it"
            with contextlib.redirect_stdout(result_stream):
                print_result({"url": url}, as_json=options.json, text=text)
            result_stream.flush()
            stop.wait()
            print("stopping", file=sys.stderr)
        finally:
            take_down(is_own_cluster=is_own_cluster)
    return 0


def _parser() -> CommandParser:
    limits, config = ServiceLimits(), ServiceConfig(store_uri="", engines_uri="")
    parser = CommandParser("serve", description="Search a store over HTTP, and from a page.")
    parser.add_argument("--store", required=True, metavar="URI", help="a store with an index")
    parser.add_argument("--engines", default=default_engines_uri(), metavar="URI")
    parser.add_argument(
        "--host", default="127.0.0.1", help="to bind to; 0.0.0.0 lets other machines ask"
    )
    parser.add_argument("--port", type=int, default=DEFAULT_PORT, help="to bind to")
    parser.add_argument(
        "--replicas", type=int, default=1, metavar="N", help="processes that answer"
    )
    parser.add_argument("--among", choices=MODALITIES, help="search these embeddings alone")
    parser.add_argument("--address", help="of a Ray cluster; none: Ray is started here")
    parser.add_argument(
        "--token-file",
        metavar="FILE",
        help=f"a token that requests must carry; ${TOKEN_VARIABLE} does the same",
    )
    parser.add_argument(
        "--no-thumbnails", action="store_true", help="do not read the catalog for its pictures"
    )
    parser.add_argument(
        "--refresh-seconds",
        type=float,
        default=config.refresh_seconds,
        metavar="S",
        help="between two looks for a newer snapshot",
    )
    for name, what in (
        ("max_body_bytes", "of a request"),
        ("max_hits", "k, for each query"),
        ("max_queries", "in one request"),
        ("max_image_bytes", "of an image in a query"),
        ("max_image_pixels", "of an image, in a query or shown, width times height"),
        ("max_seconds", "for a request; then 504"),
        ("max_concurrent", "requests in one replica; then 503"),
    ):
        default = getattr(limits, name)
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=type(default),
            default=default,
            metavar="N",
            help=what,
        )
    add_fetch_options(parser)
    return parser


def _token(path: str | None) -> str | None:
    if path is None:
        return os.environ.get(TOKEN_VARIABLE) or None
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--token-file {path}: cannot be read ({error})") from error


def _hosts(host: str) -> tuple[str, ...] | None:
    """Names that a service on this machine alone is asked by; None if others may ask as well."""
    try:
        is_alone = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_alone = False
    own = f"[{host}]" if ":" in host else host
    return tuple({"localhost", "127.0.0.1", "[::1]", own}) if is_alone else None


def _absolute(uri: str) -> str:
    """Replicas do not run in this folder."""
    return uri if "://" in uri else str(Path(uri).expanduser().absolute())


def _check_is_free(host: str, port: int) -> None:
    try:
        family = socket.getaddrinfo(host, port)[0][0]
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise ClipmillError(
            f"{host}:{port} cannot be bound to ({error.strerror}); name another --host or --port, "
            "or stop what listens there"
        ) from error


if __name__ == "__main__":
    run(main, sys.argv[1:])
