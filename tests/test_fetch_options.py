"""Tests of jobs/fetch_options.py: the same options for all commands that read images by URI."""

from pathlib import Path

import pytest

from jobs import embed, engine, nightly, serve
from jobs.command import CommandParser
from jobs.embed_options import add_embed_options, embed_config_from
from jobs.engine import build_config_from
from jobs.fetch_options import fetch_policy_from
from pipelines.fetching.fetch_policy import FetchPolicy
from tests.commands import command

RUN = ["--catalog", "a", "--store", "b", "--checkpoint", "c"]


def parser() -> CommandParser:
    made = CommandParser("sample", description="For the tests.")
    add_embed_options(made)
    return made


def test_without_options_the_policy_is_the_default():
    options = parser().parse_options(RUN)
    assert fetch_policy_from(options) == FetchPolicy()
    assert embed_config_from(options, command=()).limits.fetch == FetchPolicy()


def test_flags_and_yaml_say_the_same(tmp_path: Path):
    words = ["--fetch-allow", "10.0.0.0/8", "images.internal", "s3:", "--fetch-hosts", "*.acme.com"]
    words += ["--max-fetch-seconds", "5", "--max-redirects", "1"]
    file = tmp_path / "night.yaml"
    file.write_text(
        "fetch-allow: [10.0.0.0/8, images.internal, 's3:']\nfetch-hosts: ['*.acme.com']\n"
        "max-fetch-seconds: 5\nmax-redirects: 1\n"
    )
    expected = FetchPolicy(
        allow=("10.0.0.0/8", "images.internal", "s3:"),
        hosts=("*.acme.com",),
        max_seconds=5,
        max_redirects=1,
    )
    for given in (words, ["--config", str(file)]):
        options = parser().parse_options([*RUN, *given])
        assert embed_config_from(options, command=()).limits.fetch == expected
        build = engine._build_parser().parse_options(
            ["--checkpoint", "a", "--calibrate", "b", *given]
        )
        assert build_config_from(build).sample.limits.fetch == expected
        served = serve._parser().parse_options(["--store", "a", *given])
        assert fetch_policy_from(served) == expected


@pytest.mark.parametrize("main", [embed.main, nightly.main])
def test_what_cannot_be_meant_ends_with_2_before_ray_starts(main):
    done = command(main, [*RUN, "--fetch-allow", "10.*"])
    assert done.code == 2
    assert "fetch_allow='10.*'" in done.err
