"""Fixtures that many tests share: Ray, the demo checkpoint, sample catalogs."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    # Triton reads it as it is imported: kernels then run on the CPU, in its interpreter.
    os.environ["TRITON_INTERPRET"] = "1"
    # Small towers gain nothing by more; beside other programs, threads wait for each other's cores.
    torch.set_num_threads(1)

from jobs.cluster import ray_cluster
from jobs.demo.run import CHECKPOINT_DIR
from pipelines.catalog import CatalogConfig
from pipelines.embedding import EmbedConfig, embed
from pipelines.engines import EngineChoice
from pipelines.fetching import fetch
from pipelines.indexing import IndexConfig, build_index
from tests.catalogs import scene_rows, write_rows

# A machine may pause at any time.
PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
# The same examples for the same code. `pytest --hypothesis-profile explore` tries others each time,
# and tells how to repeat one that fails.
settings.register_profile("repeatable", PATIENT, derandomize=True)
settings.register_profile("explore", PATIENT, derandomize=False, print_blob=True)
settings.load_profile("repeatable")


@pytest.fixture(scope="session", autouse=True)
def no_fsync() -> Iterator[None]:
    """Disks keep what they have in mind: no test cuts the power, and each file costs 25 ms."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture
def no_batch_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fetch that is late ends by its own limit, also on a machine that pauses meanwhile."""
    monkeypatch.setattr(fetch, "BATCH_LIMITS", 10_000)


@pytest.fixture
def whole_lookups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter builds a lookup of Huffman codes at once, not in many slow parts."""
    from tests.triton_device import DEVICE  # skips where there is no Triton

    if DEVICE.type == "cpu":
        from engine.decoding import huffman_lookups

        monkeypatch.setattr(huffman_lookups, "_LOOKUP_PART", huffman_lookups.LOOKUP_SIZE)


@pytest.fixture(scope="session")
def checkpoint_dir() -> Path:
    return CHECKPOINT_DIR


@pytest.fixture(scope="session")
def engines_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="session")
def quantized_demo():
    """Both towers of the demo checkpoint in FP8 (`QuantizedDemo`); tests leave them as they are."""
    from tests.quantized import quantize_demo  # takes seconds, and most tests do without

    return quantize_demo()


@pytest.fixture(scope="session")
def calibrated_engines(tmp_path_factory: pytest.TempPathFactory):
    """Two FP8 engines of a small checkpoint (`CalibratedEngines`); tests leave them as they are."""
    from tests.calibrated_engines import build_engines  # as above

    return build_engines(tmp_path_factory.mktemp("calibrated"))


@pytest.fixture(scope="session")
def demo_build(tmp_path_factory: pytest.TempPathFactory):
    """The demo checkpoint's fp8 engine, built end to end (`DemoBuild`); tests leave it as it is."""
    from tests.demo_build import build_demo  # takes seconds, and most tests do without

    return build_demo(tmp_path_factory.mktemp("demo-build"))


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """Ray on this machine, as a command starts it; one for the whole session."""
    with ray_cluster(None):
        yield
    assert not ray.is_initialized()


@pytest.fixture(scope="session")
def scene_store(
    tmp_path_factory: pytest.TempPathFactory,
    checkpoint_dir: Path,
    engines_dir: Path,
    local_ray: None,
) -> Path:
    """A store of 60 scenes with their captions, indexed; tests only read it."""
    folder = tmp_path_factory.mktemp("scenes")
    embed(
        EmbedConfig(
            catalog=CatalogConfig(uri=str(write_rows(folder / "catalog", scene_rows(60)))),
            store_uri=str(folder / "store"),
            engine=EngineChoice(checkpoint=str(checkpoint_dir), engines_uri=str(engines_dir)),
        )
    )
    build_index(IndexConfig(store_uri=str(folder / "store")))
    return folder / "store"


@pytest.fixture(scope="session")
def carried_store(tmp_path_factory: pytest.TempPathFactory, engines_dir: Path) -> Path:
    """A store of the same scenes with carried columns, made without Ray; tests only read it."""
    from tests.searchable import searchable_store  # loads an engine, and most tests do without

    return searchable_store(tmp_path_factory.mktemp("carried") / "store", engines_dir=engines_dir)


@pytest.fixture
def night_by_ray(
    tmp_path: Path,
    checkpoint_dir: Path,
    engines_dir: Path,
    local_ray: None,
    monkeypatch: pytest.MonkeyPatch,
):
    """60 texts, embedded and indexed by `clipmill nightly` (`Night`)."""
    from jobs import embed, nightly
    from tests.night import Night, text_rows

    for module in (nightly, embed):
        monkeypatch.setattr(module, "ray_cluster", lambda *_, **__: contextlib.nullcontext())
    made = Night(tmp_path / "catalog", tmp_path / "store", checkpoint_dir, engines_dir)
    write_rows(made.catalog_dir, text_rows(60), num_files=2)
    first = made.done()
    assert (first["outcome"], first["snapshot"], first["parent"]) == ("committed", 1, None)
    assert (first["num_indexes_built"], first["run"]["num_embedded"]) == (1, {"text": 60})
    return made


@pytest.fixture
def night(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """The same without Ray's workers, which takes a tenth of the time."""
    from tests.stages_here import use_stages_here

    use_stages_here(monkeypatch)
    return request.getfixturevalue("night_by_ray")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip GPU tests where there is none; with REQUIRE_GPU=1 its absence fails them."""
    if item.get_closest_marker("gpu") is None or torch.cuda.is_available():
        return
    if os.environ.get("REQUIRE_GPU") == "1":
        pytest.fail("REQUIRE_GPU=1, but there is no CUDA GPU")
    pytest.skip("no CUDA GPU")
