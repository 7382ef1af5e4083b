"""Tests of pipelines/lineage.py."""

import dataclasses
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from pipelines.counts import KeyCounts
from pipelines.lineage import (
    GUARDS,
    Lineage,
    Measurement,
    code_version,
    lineage_from,
    measurement_line,
)

LINEAGE = Lineage(
    plan={
        "text": KeyCounts(
            num_new=3,
            num_changed=0,
            num_retried=0,
            num_moved=0,
            num_unchanged=5,
            num_staged=0,
            num_deleted=0,
            num_twins=0,
        )
    },
    code_version="1.2.3",
    command=("clipmill", "nightly"),
    accepted=("deletions",),
    measurements=(
        Measurement(
            guard="deletions",
            modality=None,
            value=0.5,
            bound=0.2,
            is_tripped=True,
            detail="30 of 60 keys",
        ),
    ),
)


def test_it_is_read_back_from_json():
    assert lineage_from(json.loads(json.dumps(dataclasses.asdict(LINEAGE)))) == LINEAGE


def test_the_version_is_that_of_the_sources():
    pyproject = Path(__file__).resolve().parent.parent / "pyproject.toml"
    assert code_version() == tomllib.loads(pyproject.read_text())["project"]["version"]


def test_workers_that_read_lineage_need_no_database():
    words = "import sys, pipelines.encode; sys.exit('duckdb' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", words], check=False).returncode == 0


@pytest.mark.parametrize("guard", GUARDS)
def test_a_measurement_says_on_which_side_of_its_bound_it_may_be(guard):
    at_most = {"rejects", "deletions", "norms", "collapse"}
    measurement = Measurement(
        guard=guard, modality="text", value=0.5, bound=0.25, is_tripped=False, detail="of all"
    )
    side = "most" if guard in at_most else "least"
    assert measurement_line(measurement) == (
        f"{guard} of text: 0.5000, at {side} 0.25 is allowed (of all)"
    )
