"""A real store is opened for the service: one encoder for all, and rebuilt indexes are seen."""

import dataclasses
import shutil
from pathlib import Path

import pytest

from jobs.serving.live import Opened, is_current, open_current
from jobs.serving.options import ServiceConfig
from pipelines.errors import UnknownKeyError
from pipelines.indexes.manifest import find_index, publish_index
from pipelines.indexes.queries import Part, Query
from pipelines.store import Store


@pytest.fixture(scope="module")
def config(
    tmp_path_factory: pytest.TempPathFactory, carried_store: Path, engines_dir: Path
) -> ServiceConfig:
    store_dir = tmp_path_factory.mktemp("opened") / "store"
    shutil.copytree(carried_store, store_dir)
    return ServiceConfig(store_uri=str(store_dir), engines_uri=str(engines_dir))


@pytest.fixture(scope="module")
def opened(config: ServiceConfig) -> Opened:
    return open_current(config)


def test_all_searchers_share_one_encoder_and_the_next_snapshot_does(
    config: ServiceConfig, opened: Opened
):
    newer = open_current(config)
    searchers = [*opened.searchers.values(), *newer.searchers.values()]
    assert len(searchers) == 4
    assert len({id(searcher._encoder) for searcher in searchers}) == 1


def test_an_index_that_was_built_anew_is_seen(config: ServiceConfig, opened: Opened):
    assert is_current(opened, config)
    store = Store(config.store_uri)
    manifest = find_index(store, opened.snapshot, modality="text")
    assert manifest is not None
    newer = dataclasses.replace(manifest, build_id="0" * 16)
    root = Path(config.store_uri)
    shutil.copytree(root / manifest.folder, root / newer.folder)
    publish_index(store, newer)
    assert not is_current(opened, config)
    assert open_current(config).searchers["text"].build_id == "0" * 16
    (root / newer.folder).parent.joinpath("manifest.json").unlink()
    assert is_current(opened, config)  # until there is another


def test_what_cannot_be_asked_is_said_before_anything_is_encoded(opened: Opened):
    searcher = opened.searchers["image"]
    searcher.check([Query(parts=(Part(key="k0007"), Part(text="a ring")))])
    with pytest.raises(UnknownKeyError):
        searcher.check([Query(parts=(Part(key="nobody"),))])
    with pytest.raises(ValueError, match="vector has 3 numbers"):
        searcher.check([Query(parts=(Part(vector=(1.0, 2.0, 3.0)),))])
