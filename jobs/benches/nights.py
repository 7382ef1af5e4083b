"""Measures nights of a store: the first, one with a share of changed rows, and unchanged ones.

Knows nothing of how a night works. The catalog is made for it, of short texts with a version
column; each night is `clipmill nightly`, the whole command.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from engine.errors import ClipmillError
from jobs.benches.programs import Watched, run_watched
from pipelines import schema
from pipelines.counts import KeyCounts, plan_line
from pipelines.engines import EngineChoice
from pipelines.snapshots import read_snapshot
from pipelines.store import Store

NAMES = ("first", "some rows changed", "unchanged", "all files rewritten")
NUM_FILES = 20
ROWS_PER_GROUP = 50_000
BATCH_ROWS = 1_024  # the texts are short: with 32, most of the time would be that of starting tasks


@dataclass(frozen=True, kw_only=True, slots=True)
class NightsConfig:
    """What is measured."""

    num_keys: int
    """Of the catalog."""
    engine: EngineChoice
    """What embeds it."""
    changed_share: float = 0.01
    """Of the keys: in the second night they have another text and another version."""

    def __post_init__(self) -> None:
        """Check the bounds."""
        if self.num_keys < NUM_FILES:
            raise ValueError(f"num_keys={self.num_keys}: expected at least {NUM_FILES}")
        if not 0 < self.changed_share <= 1:
            raise ValueError(f"changed_share={self.changed_share}: expected above 0, at most 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class NightFigures:
    """One night."""

    name: str
    """What was done to the catalog before it."""
    committed: bool
    """Whether it made a snapshot."""
    plan: KeyCounts
    """What it found."""
    num_encoded: int
    """Rows that the encoders took."""
    encoding_seconds: float
    """Of cores, summed over the encoders; their wall seconds would count what runs beside them."""
    encoding_share: float
    """Of the first night's."""
    num_files: int
    """Parquet files of the snapshot after it."""
    seconds: float
    """The whole command, Ray's start included."""
    peak_memory_bytes: int
    """Of all processes together."""


def measure_nights(config: NightsConfig) -> list[NightFigures]:
    """Make a catalog and run nights over it.

    Raises:
        ClipmillError: A night failed, or did something else than was to be done.
    """
    num_changed = max(1, int(config.num_keys * config.changed_share))
    with tempfile.TemporaryDirectory(prefix="clipmill-bench-") as scratch:
        folder = Path(scratch)
        words = _words(folder, config.engine)
        watched = []
        for seed, changed in ((1, 0), (2, num_changed), (None, num_changed), (3, num_changed)):
            if seed is not None:
                _write(folder / "catalog", num_keys=config.num_keys, num_changed=changed, seed=seed)
            night = run_watched(words)
            watched.append((night, _num_files(folder / "store")))
    nights = [
        _figures(name, night, num_files=num_files, first=watched[0][0])
        for name, (night, num_files) in zip(NAMES, watched, strict=True)
    ]
    _check(nights, num_keys=config.num_keys, num_changed=num_changed)
    return nights


def nights_lines(nights: Sequence[NightFigures]) -> list[str]:
    """A table of the nights, and what each found."""
    head = (
        f"{'':<20} {'seconds':>8} {'encoded':>10} {'encoding s':>11} {'of first':>9} "
        f"{'files':>6} {'MiB at most':>12}"
    )
    rows = [
        f"{night.name:<20} {night.seconds:>8.1f} {night.num_encoded:>10,} "
        f"{night.encoding_seconds:>11.1f} {night.encoding_share:>9.2%} {night.num_files:>6,} "
        f"{night.peak_memory_bytes / 2**20:>12,.0f}"
        for night in nights
    ]
    plans = [f"{night.name}: {plan_line(night.plan)}" for night in nights]
    return [head, *rows, *plans]


def _words(folder: Path, engine: EngineChoice) -> list[str]:
    words = ["-m", "jobs.cli", "nightly", "--json", "--engines", engine.engines_uri]
    words += ["--catalog", str(folder / "catalog"), "--store", str(folder / "store")]
    words += ["--version-column", schema.VERSION, "--backend", engine.backend]
    words += ["--batch-rows", str(BATCH_ROWS)]
    words += ["--engine", engine.engine_id] if engine.engine_id else []
    words += ["--checkpoint", engine.checkpoint] if engine.checkpoint else []
    return words


def _write(folder: Path, *, num_keys: int, num_changed: int, seed: int) -> None:
    """Write all files anew, the rows in another order for each seed."""
    folder.mkdir(exist_ok=True)
    order = np.random.default_rng(seed).permutation(num_keys)
    for number, part in enumerate(np.array_split(order, NUM_FILES)):
        digits = pc.utf8_lpad(pa.array(part).cast(pa.string()), 12, padding="0")
        versions = pa.array(np.where(part < num_changed, "2", "1"), pa.string())
        table = pa.table(
            {
                schema.KEY: pc.binary_join_element_wise("item", digits, "-"),
                schema.VERSION: versions,
                schema.TEXT: pc.binary_join_element_wise("article", digits, versions, " "),
            }
        )
        pq.write_table(table, folder / f"part-{number:04d}.parquet", row_group_size=ROWS_PER_GROUP)


def _num_files(store: Path) -> int:
    return len(read_snapshot(Store(str(store)), None).files)


def _figures(name: str, night: Watched, *, num_files: int, first: Watched) -> NightFigures:
    seconds = _encoding_seconds(night)
    run = night.report["run"]
    return NightFigures(
        name=name,
        committed=night.report["outcome"] == "committed",
        plan=KeyCounts(**run["plan"]["text"]),
        num_encoded=run["num_embedded"]["text"],
        encoding_seconds=seconds,
        encoding_share=seconds / _encoding_seconds(first),
        num_files=num_files,
        seconds=night.seconds,
        peak_memory_bytes=night.peak_memory_bytes,
    )


def _encoding_seconds(night: Watched) -> float:
    stages = night.report["run"]["stages"]
    return float(sum(stage["core_seconds"] for stage in stages if stage["stage"] == "encode"))


def _check(nights: Sequence[NightFigures], *, num_keys: int, num_changed: int) -> None:
    encoded = [night.num_encoded for night in nights]
    unchanged = [night.plan.num_unchanged for night in nights]
    if encoded != [num_keys, num_changed, 0, 0] or unchanged[2:] != [num_keys, num_keys]:
        raise ClipmillError(f"of {num_keys} rows {num_changed} changed once, but {nights}")
