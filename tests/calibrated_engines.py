"""Two real FP8 engines of one small checkpoint, built, judged and promoted by `clipmill engine`.

They differ in the rows that they were calibrated with.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.build import build_unquantized, engine_id_of
from engine.checkpoint import find_checkpoint
from engine.manifest import read_manifest
from engine.quantization.quantize import MIN_ROWS
from engine.registry import Registry
from pipelines.sampling import MIN_HELD_OUT_ROWS
from tests.catalogs import scene_rows, write_rows
from tests.checkpoints import save_clip
from tests.commands import Done, clipmill_engine

NUM_ROWS = MIN_ROWS + MIN_HELD_OUT_ROWS
# Of random weights, neighbours and recall say nothing.
THRESHOLDS = ("--min-neighbour-overlap", 0, "--max-recall-loss", 1)


@dataclass(frozen=True, kw_only=True)
class CalibratedEngines:
    """The engines and what they were made of; tests copy the folder of engines to change it."""

    checkpoint_dir: Path
    catalog_dir: Path
    engines_dir: Path
    first: Done
    """How the first was built, as text."""
    second: Done
    """How the second was, as JSON; it is promoted."""

    @property
    def digest(self) -> str:
        """Of the checkpoint."""
        return find_checkpoint(str(self.checkpoint_dir)).digest

    @property
    def first_id(self) -> str:
        return self.first.out.split()[1]

    @property
    def second_id(self) -> str:
        engine_id: str = self.second.json["manifest"]["engine_id"]
        return engine_id

    def build(self, engines_dir: Path, *options: object) -> Done:
        """Run `clipmill engine build` with this checkpoint and catalog."""
        return build(self.checkpoint_dir, self.catalog_dir, engines_dir, *options)


def build(checkpoint_dir: Path, catalog_dir: Path, engines_dir: Path, *options: object) -> Done:
    """Run `clipmill engine build` on one thread.

    Threads that wait for each other at layers of this size take ten times as long on a busy CPU.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return clipmill_engine(
            "build",
            *("--engines", engines_dir),
            *("--checkpoint", checkpoint_dir),
            *("--calibrate", catalog_dir),
            *("--held-out", MIN_HELD_OUT_ROWS),
            *THRESHOLDS,
            *options,
        )
    finally:
        torch.set_num_threads(num_threads)


def build_engines(folder: Path) -> CalibratedEngines:
    """Build both, in seconds."""
    checkpoint_dir = save_clip(folder / "checkpoint")
    rows = [
        {**row, "number": ("none", "one", "two")[place % 3]}
        for place, row in enumerate(scene_rows(NUM_ROWS))
    ]
    catalog_dir = write_rows(folder / "catalog", rows)
    engines_dir = folder / "engines"
    first = build(checkpoint_dir, catalog_dir, engines_dir, "--seed", 1)
    second = build(checkpoint_dir, catalog_dir, engines_dir, "--seed", 2, "--json")
    assert (first.code, second.code) == (0, 0), first.err + second.err
    return CalibratedEngines(
        checkpoint_dir=checkpoint_dir,
        catalog_dir=catalog_dir,
        engines_dir=engines_dir,
        first=first,
        second=second,
    )


def put_sabotaged_engine(engines: CalibratedEngines, *, engines_dir: Path, folder: Path) -> str:
    """Put the checkpoint's fp16 engine in place, with the weights of another; returns its id."""
    checkpoint = find_checkpoint(str(engines.checkpoint_dir))
    other = find_checkpoint(str(save_clip(folder, seed=1)))
    engine_id = engine_id_of(checkpoint, precision="fp16")

    def write(directory: Path) -> None:
        build_unquantized(other, directory, precision="fp16")
        dataclasses.replace(
            read_manifest(directory),
            engine_id=engine_id,
            checkpoint=checkpoint.name,
            checkpoint_digest=checkpoint.digest,
        ).write(directory)

    Registry(str(engines_dir)).obtain(engine_id, write)
    return engine_id
