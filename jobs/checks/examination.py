"""The options of `clipmill doctor`, and all that is looked at with them.

Knows nothing of how a thing is looked at.
"""

import os
from argparse import Namespace
from collections.abc import Sequence

from engine.backends.choice import Machine, this_machine
from engine.errors import DeviceError
from engine.registry import default_engines_uri
from jobs.checks.check import Check
from jobs.checks.cluster import ray_checks
from jobs.checks.node import node_checks, package_checks
from jobs.checks.places import catalog_check, engines_check, store_check
from jobs.checks.report import show
from jobs.command import CommandParser
from pipelines.catalog import CatalogConfig


def examine(argv: Sequence[str] | None = None) -> int:
    """Look at everything and print it; returns the exit code."""
    parser = CommandParser(
        "doctor", description="What this machine or cluster can run, and what mends it."
    )
    parser.add_argument("--store", metavar="URI", help="to be written, read and left as it was")
    parser.add_argument("--catalog", metavar="URI", help="whose files and schema are read")
    parser.add_argument("--key-column", default="key", metavar="NAME")
    parser.add_argument("--image-column", metavar="NAME", help="as for embed")
    parser.add_argument("--text-column", metavar="NAME", help="as for embed")
    parser.add_argument("--version-column", metavar="NAME", help="as for embed")
    parser.add_argument("--engines", default=default_engines_uri(), metavar="URI")
    parser.add_argument("--address", help="of a Ray cluster, whose nodes look at themselves")
    options = parser.parse_options(argv)
    return show(all_checks(options), as_json=options.json)


def all_checks(options: Namespace) -> list[Check]:
    """All checks that the options ask for."""
    address = options.address or os.environ.get("RAY_ADDRESS")
    checks = package_checks() if address else node_checks()
    machine = None if address else _machine_here()
    checks += [*ray_checks(address), engines_check(options.engines, machine=machine)]
    if options.store:
        checks.append(store_check(options.store))
    if options.catalog:
        config = CatalogConfig(
            uri=options.catalog,
            key_column=options.key_column,
            image_column=options.image_column,
            text_column=options.text_column,
            version_column=options.version_column,
        )
        checks.append(catalog_check(config))
    return checks


def _machine_here() -> Machine | None:
    """None if nothing can use its GPU, which is a check of its own."""
    try:
        return this_machine()
    except DeviceError:
        return None
