"""The demo checkpoint built from end to end without a GPU, for tests."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.accuracy import Thresholds
from engine.checkpoint import find_checkpoint
from engine.model import load_model
from engine.registry import Engine, Registry
from engine.sample import Sample
from jobs.demo.run import CHECKPOINT_DIR
from pipelines.building import BuildConfig, BuildResult, build_engine
from pipelines.catalog import CatalogConfig
from pipelines.sampling import SampleConfig, draw_samples
from pipelines.schema import MODALITIES
from tests.catalogs import scene_rows, write_rows

NUM_ROWS, NUM_HELD_OUT = 512, 128
ARCHITECTURES = ("sm_89", "sm_120")
# Below the demo's usual 0.99 and 0.95.
THRESHOLDS = Thresholds(min_cosine_p1=0.98, min_neighbour_overlap=0.9)

Steps = tuple[tuple[str, int, int], ...]


@dataclass(frozen=True, kw_only=True)
class DemoBuild:
    """What was asked for, what came of it, and what was said meanwhile."""

    config: BuildConfig
    """With a catalog of drawn scenes and captions."""
    calibration: Sample
    """Drawn as the config says."""
    held_out: Sample
    """Drawn beside it."""
    result: BuildResult
    """Of the build."""
    steps: Steps
    """Its progress."""

    @property
    def registry(self) -> Registry:
        """Where the engine is."""
        return Registry(self.config.engines_uri)

    @property
    def engine(self) -> Engine:
        """What was built."""
        engine = self.registry.find(self.result.manifest.engine_id)
        assert engine is not None
        return engine


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch do with one: small towers gain nothing by more, which wait for each other's cores
    where other programs run, and sums of other parts give other last bits."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def build(config: BuildConfig) -> tuple[BuildResult, Steps]:
    """Build an engine; returns what came of it, and its progress."""
    steps: list[tuple[str, int, int]] = []
    with one_thread():
        result = build_engine(config, on_progress=lambda *step: steps.append(step))
    return result, tuple(steps)


def build_demo(folder: Path) -> DemoBuild:
    """Build the demo checkpoint's fp8 engine, with plans for two cards."""
    catalog = write_rows(folder / "catalog", scene_rows(NUM_ROWS + NUM_HELD_OUT), num_files=2)
    config = BuildConfig(
        checkpoint=str(CHECKPOINT_DIR),
        sample=SampleConfig(
            catalog=CatalogConfig(uri=str(catalog)), num_rows=NUM_ROWS, num_held_out=NUM_HELD_OUT
        ),
        thresholds=THRESHOLDS,
        backend="onnxruntime",
        plans_for=ARCHITECTURES,
        engines_uri=str(folder / "engines"),
    )
    model = load_model(find_checkpoint(config.checkpoint))
    calibration, held_out = draw_samples(
        config.sample,
        preprocessing=model.preprocessing,
        modalities=MODALITIES,
        on_progress=lambda *step: None,
    )
    result, steps = build(config)
    return DemoBuild(
        config=config, calibration=calibration, held_out=held_out, result=result, steps=steps
    )
