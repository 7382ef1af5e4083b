"""Fixtures that many tests share: Ray, the demo checkpoint, sample catalogs."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from jobs.cluster import ray_cluster
from jobs.demo.run import CHECKPOINT_DIR


@pytest.fixture(scope="session")
def checkpoint_dir() -> Path:
    return CHECKPOINT_DIR


@pytest.fixture(scope="session")
def engines_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """Ray on this machine, as a command starts it; one for the whole session."""
    with ray_cluster(None):
        yield
    assert not ray.is_initialized()
