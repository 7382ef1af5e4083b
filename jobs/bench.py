"""`clipmill bench`: measures the pipeline, the answers of a store, or the fidelity of an engine.

Knows nothing of how to make either faster.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from engine.errors import ClipmillError
from engine.registry import default_engines_uri
from jobs.command import CommandParser, print_result, run
from jobs.demo.catalog import sample_rows, write_catalog
from jobs.demo.run import CHECKPOINT_DIR
from pipelines.retrieval import pair_recall, recall_line

SAMPLE_SECONDS = 0.5
NUM_SCENES = 1_000  # distinct ones; beyond, they come again under other keys


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineFigures:
    """One size of catalog."""

    num_rows: int
    """Rows, each an image and a text."""
    seconds: float
    """The whole command, Ray's start included."""
    rows_per_second: float
    """Images and texts encoded in a second of the stages' time."""
    peak_memory_bytes: int
    """Of all processes together: proportional set size, so that shared pages count once."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = CommandParser(
        "bench",
        description="pipeline: speed and memory over catalog sizes. query: recall of the pairs "
        "of a store. agreement: cosine of an engine's embeddings to transformers' own.",
    )
    parser.add_argument("what", choices=sorted(BENCHES))
    parser.add_argument(
        "--rows",
        type=int,
        nargs="+",
        default=[5_000, 50_000],
        help="pipeline: catalog sizes; agreement: rows compared",
    )
    parser.add_argument("--checkpoint", default=str(CHECKPOINT_DIR), metavar="ID_OR_DIR")
    parser.add_argument("--catalog", metavar="URI", help="agreement: images and texts")
    parser.add_argument("--engines", default=default_engines_uri(), metavar="URI")
    parser.add_argument("--store", metavar="URI", help="query: an indexed store of pairs")
    parser.add_argument("-k", type=int, nargs="+", default=[1, 5, 10], help="query: cut-offs")
    options = parser.parse_options(argv)
    figures, lines = BENCHES[options.what](options)
    print_result(figures, as_json=options.json, text="\n".join(lines))
    return 0


def _pipeline(options: Namespace) -> tuple[Any, list[str]]:
    figures = [measure_pipeline(rows, checkpoint=options.checkpoint) for rows in options.rows]
    head = "     rows   seconds   rows/s encoded   peak memory MiB"
    lines = [
        f"{figure.num_rows:>9,} {figure.seconds:>9.1f} {figure.rows_per_second:>16,.0f} "
        f"{figure.peak_memory_bytes / 2**20:>17,.0f}"
        for figure in figures
    ]
    return figures, [head, *lines]


def _query(options: Namespace) -> tuple[Any, list[str]]:
    if options.store is None:
        raise ValueError("bench query needs --store")
    recalls = pair_recall(options.store, ks=options.k)
    return recalls, [recall_line(recall) for recall in recalls]


def _agreement(options: Namespace) -> tuple[Any, list[str]]:
    # transformers and torch are heavy; only this needs them.
    from jobs.agreement import agreement_line, measure_agreement

    if options.catalog is None:
        raise ValueError("bench agreement needs --catalog")
    agreements = measure_agreement(
        options.checkpoint,
        catalog_uri=options.catalog,
        num_rows=options.rows[0],
        engines_uri=options.engines,
    )
    return agreements, [agreement_line(agreement) for agreement in agreements]


BENCHES: dict[str, Callable[[Namespace], tuple[Any, list[str]]]] = {
    "agreement": _agreement,
    "pipeline": _pipeline,
    "query": _query,
}


def measure_pipeline(num_rows: int, *, checkpoint: str) -> PipelineFigures:
    """Embed a sample catalog in a process of its own, watching the memory of all its children."""
    folder = Path(tempfile.mkdtemp(prefix="clipmill-bench-"))
    try:
        drawn = sample_rows(min(num_rows, NUM_SCENES))
        rows = [replace(drawn[row % len(drawn)], key=f"{row:09d}") for row in range(num_rows)]
        write_catalog(folder / "catalog", rows)
        command = [sys.executable, "-m", "jobs.cli", "embed", "--json", "--checkpoint", checkpoint]
        command += ["--catalog", str(folder / "catalog"), "--store", str(folder / "store")]
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        watch = _MemoryWatch(process.pid)
        watch.start()
        output, _ = process.communicate()
        seconds = time.perf_counter() - started
        watch.stop()
        if process.returncode:
            raise ClipmillError(f"{' '.join(command)} ended with {process.returncode}")
        report = json.loads(output)
    finally:
        shutil.rmtree(folder)
    return PipelineFigures(
        num_rows=num_rows,
        seconds=seconds,
        rows_per_second=sum(report["num_embedded"].values()) / report["seconds"],
        peak_memory_bytes=watch.peak_bytes,
    )


class _MemoryWatch(threading.Thread):
    def __init__(self, pid: int) -> None:
        super().__init__(name="memory-watch", daemon=True)
        self._root = psutil.Process(pid)
        self._stopped = threading.Event()
        self.peak_bytes = 0

    def run(self) -> None:
        while not self._stopped.wait(SAMPLE_SECONDS):
            self.peak_bytes = max(self.peak_bytes, self._now())

    def stop(self) -> None:
        self._stopped.set()
        self.join()

    def _now(self) -> int:
        total = 0
        try:
            processes = [self._root, *self._root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return 0
        for process in processes:
            try:
                total += process.memory_full_info().pss
            except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
                continue  # it ended between listing and reading
        return total


if __name__ == "__main__":
    run(main, sys.argv[1:])
