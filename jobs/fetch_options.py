"""The options of what may be fetched, for all commands that read images by URI.

Knows nothing of how anything is fetched.
"""

from argparse import Namespace

from jobs.command import CommandParser
from pipelines.fetching.fetch_policy import FetchPolicy


def fetch_policy_from(options: Namespace) -> FetchPolicy:
    """The policy that the options describe; ValueError for one out of bounds.

    Args:
        options: Of a parser with `add_fetch_options`.
    """
    return FetchPolicy(
        allow=tuple(options.fetch_allow),
        hosts=tuple(options.fetch_hosts),
        max_seconds=options.max_fetch_seconds,
        max_redirects=options.max_redirects,
    )


def add_fetch_options(parser: CommandParser) -> None:
    """Give a parser the options of a policy."""
    policy = FetchPolicy()
    group = parser.add_argument_group("images by URI")
    group.add_argument(
        "--fetch-allow",
        nargs="*",
        default=[],
        metavar="WHAT",
        help="besides public hosts: hosts (images.internal), networks (10.0.0.0/8), schemes (s3:, "
        "file:), folders (/data/images)",
    )
    group.add_argument(
        "--fetch-hosts",
        nargs="*",
        default=[],
        metavar="HOST",
        help="no others than these and those of --fetch-allow, for example *.acme.com",
    )
    group.add_argument(
        "--max-fetch-seconds", type=float, default=policy.max_seconds, metavar="SECONDS"
    )
    group.add_argument("--max-redirects", type=int, default=policy.max_redirects, metavar="N")
