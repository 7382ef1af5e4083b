"""Measures indexing: a build and an update of 1 % of the rows, in time, memory and recall.

Knows nothing of how it is done: each is `clipmill index`, the whole command, on a store of vectors
like CLIP's that is made for it; and beside it what autofaiss makes of the same vectors.
"""

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jobs.benches.programs import run_watched
from jobs.benches.vector_stores import (
    NUM_FILES,
    change_store,
    make_store,
    num_changes,
    rows_of_last_file,
    stored_vectors,
)
from pipelines.indexes.manifest import find_index, indexed_files
from pipelines.indexes.opening import TRUTH_FILE
from pipelines.indexes.recall import CHOSEN_K
from pipelines.snapshots import Snapshot
from pipelines.store import Store


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexBenchConfig:
    """What is measured."""

    num_rows: int
    """Images."""
    embedding_dim: int
    """D."""
    memory_bytes: int = 2**30
    """What a search may want in memory."""
    words: tuple[str, ...] = ()
    """More options of `clipmill index`."""
    changed_share: float = 0.01
    """Of the rows: half of these have another vector, a quarter goes, and a quarter is new."""
    page: str | None = None
    """A file for the plots of the index that is built first."""
    autofaiss_python: str | None = None
    """A Python that has autofaiss, to be measured beside it; None: it is not."""

    def __post_init__(self) -> None:
        """Check the bounds."""
        if self.num_rows < NUM_FILES:
            raise ValueError(f"num_rows={self.num_rows}: expected at least {NUM_FILES}")
        if not 0 < self.changed_share < 1:
            raise ValueError(f"changed_share={self.changed_share}: expected between 0 and 1")
        least = sum(num_changes(self.num_rows, changed_share=self.changed_share))
        most = rows_of_last_file(self.num_rows)
        if least > most:
            raise ValueError(
                f"changed_share={self.changed_share}: {least} rows would change or go, expected at "
                f"most {most}, those of the last of {NUM_FILES} files"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class SettingFigures:
    """Searches at one setting."""

    kind: str
    """Of queries: image or text."""
    setting: int
    """Lists that are visited; of autofaiss, the milliseconds that it chose its parameters for."""
    recall: float
    """Of the 10 nearest."""
    search_seconds: float
    """Of one, the median, on one thread."""


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexFigures:
    """An index that was made."""

    name: str
    """What was done to the store before it, or by what it was made."""
    seconds: float
    """The whole command; of autofaiss, the build alone."""
    peak_memory_bytes: int
    """Proportional set size, mapped pages included."""
    factory: str
    """FAISS's name of the type."""
    reason: str
    """Why."""
    setting: int | None
    """That searches will have; None: whichever of them."""
    measured: tuple[SettingFigures, ...]
    """All that were tried."""


def measure_index(config: IndexBenchConfig) -> Iterator[IndexFigures]:
    """Make a store, index it, change some rows, index it again; yields each when it is measured.

    Raises:
        ClipmillError: A command failed.
    """
    with tempfile.TemporaryDirectory(prefix="clipmill-bench-") as scratch:
        store = Store(f"{scratch}/store")
        words = ["-m", "jobs.cli", "index", "--store", store.uri, "--json"]
        words += ["--max-memory-bytes", str(config.memory_bytes), *config.words]
        snapshot = make_store(store, num_rows=config.num_rows, embedding_dim=config.embedding_dim)
        page = [] if config.page is None else ["--page", config.page]
        yield _figures("first", [*words, *page])
        if config.autofaiss_python is not None:
            yield _of_autofaiss(store, snapshot, config, scratch=Path(scratch) / "autofaiss")
        change_store(store, snapshot, changed_share=config.changed_share)
        yield _figures(f"{config.changed_share:.0%} changed", words)


def index_lines(run: IndexFigures) -> list[str]:
    """A table of one of them; the setting of searches is marked."""
    lines = [
        f"{run.name}: {run.seconds:,.1f} s, {run.peak_memory_bytes / 2**20:,.0f} MiB at most, "
        f"{run.factory}: {run.reason}",
        f"{'setting':>9} {'queries':>8} {'recall@10':>10} {'ms':>7}",
    ]
    for found in run.measured:
        mark = "*" if found.setting == run.setting else " "
        lines.append(
            f"{mark}{found.setting:>8,} {found.kind:>8} {found.recall:>10.3f} "
            f"{found.search_seconds * 1e3:>7.2f}"
        )
    return lines


def _figures(name: str, words: Sequence[str]) -> IndexFigures:
    run = run_watched(words)
    # Of images; that of texts is there for its queries.
    manifest = next(entry for entry in run.report if entry["modality"] == "image")
    return IndexFigures(
        name=name,
        seconds=run.seconds,
        peak_memory_bytes=run.peak_memory_bytes,
        factory=manifest["factory"],
        reason=manifest["reason"],
        setting=manifest["setting"],
        measured=tuple(
            SettingFigures(
                kind=entry["kind"],
                setting=entry["setting"],
                recall=entry["recall"][str(CHOSEN_K)],
                search_seconds=entry["search_seconds"],
            )
            for entry in manifest["measured"]
        ),
    )


def _of_autofaiss(
    store: Store, snapshot: Snapshot, config: IndexBenchConfig, *, scratch: Path
) -> IndexFigures:
    """An index by autofaiss of the vectors that another was built of, asked the same."""
    assert config.autofaiss_python is not None
    manifest = find_index(store, snapshot, modality="image")
    assert manifest is not None
    (scratch / "vectors").mkdir(parents=True)
    shutil.copy(Path(store.full_path(manifest.folder)) / TRUTH_FILE, scratch / "queries.npz")
    for number, file in enumerate(indexed_files(snapshot, modality="image")):
        with store.open(file.path) as opened:
            np.save(scratch / "vectors" / f"{number:05d}.npy", stored_vectors(opened))
    program = str(Path(__file__).with_name("autofaiss_program.py"))
    run = run_watched(
        [program, str(scratch), str(config.memory_bytes)], python=config.autofaiss_python
    )
    return IndexFigures(
        name="autofaiss, build alone",
        seconds=run.report["seconds"],
        peak_memory_bytes=run.peak_memory_bytes,
        factory=run.report["factory"],
        reason="chosen by it",
        setting=None,
        measured=tuple(SettingFigures(**entry) for entry in run.report["measured"]),
    )
