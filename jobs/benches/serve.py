"""Measures `clipmill serve`: requests a second and their times, also while snapshots change.

Knows nothing of how requests are answered: the service is a process of its own, asked over HTTP.
"""

import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace

from engine.build import load_or_build
from engine.checkpoint import find_checkpoint
from engine.errors import ClipmillError
from engine.registry import Registry
from jobs.benches.load import Load, load
from jobs.benches.programs import end, run_watched
from jobs.benches.vector_stores import NUM_FILES, make_store
from jobs.demo.catalog import sample_rows
from jobs.stopping import ended_by_sigterm
from pipelines.snapshots import EngineRecord, Snapshot, commit
from pipelines.store import Store

NUM_TEXTS = 1_000
WARM_SECONDS = 5.0
SWITCH_SECONDS = 1.5


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeBenchConfig:
    """What is measured."""

    checkpoint: str
    """Id or folder: its engine encodes the texts."""
    engines_uri: str
    """Where that is, or is built."""
    num_rows: int = 1_000_000
    """Images, vectors at random."""
    memory_bytes: int = 2**30
    """What a search may want in memory."""
    num_replicas: int = 1
    """Processes that answer."""
    num_clients: int = 16
    """That ask, each when it has its answer."""
    seconds: float = 15.0
    """Of each run."""
    num_runs: int = 3
    """Without anything else."""
    num_switches: int = 20
    """Snapshots that follow each other in one more run, 1.5 s apart; 0: no such run."""

    def __post_init__(self) -> None:
        """Check the bounds."""
        for name in ("num_replicas", "num_clients", "num_runs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 1")
        if self.num_clients > NUM_TEXTS:
            raise ValueError(f"num_clients={self.num_clients}: expected at most {NUM_TEXTS}")
        if self.num_rows < NUM_FILES:
            raise ValueError(f"num_rows={self.num_rows}: expected at least {NUM_FILES}")
        if not self.seconds > 0:
            raise ValueError(f"seconds={self.seconds}: expected more than 0")
        if self.num_switches < 0:
            raise ValueError(f"num_switches={self.num_switches}: expected 0 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeFigures:
    """One run."""

    name: str
    """What went on in it."""
    requests_per_second: float
    """Answered with 200; so are the times."""
    p50_ms: float
    """Median time of a request."""
    p99_ms: float
    """99th percentile."""
    num_requests: int
    """Sent."""
    num_errors: int
    """Of these without an answer, or with another."""
    num_snapshots: int
    """That answers were of."""


def measure_serve(config: ServeBenchConfig) -> Iterator[ServeFigures]:
    """Make a store, index it, serve it, and ask; yields each run when it is done.

    Raises:
        ClipmillError: The index or the service failed.
    """
    registry = Registry(config.engines_uri)
    engine = load_or_build(find_checkpoint(config.checkpoint), registry=registry).manifest
    record = EngineRecord(
        engine_id=engine.engine_id, checkpoint=config.checkpoint, revision=engine.revision
    )
    texts = [row.text for row in sample_rows(NUM_TEXTS)]
    with tempfile.TemporaryDirectory(prefix="clipmill-bench-") as scratch:
        store = Store(f"{scratch}/store")
        snapshot = make_store(
            store, num_rows=config.num_rows, embedding_dim=engine.embedding_dim, engine=record
        )
        words = ["--store", store.uri, "--engines", config.engines_uri]
        bound = ["--max-memory-bytes", str(config.memory_bytes)]
        run_watched(["-m", "jobs.cli", "index", *words, *bound, "--json"])
        words += ["--replicas", str(config.num_replicas), "--no-thumbnails"]
        with _service([*words, "--refresh-seconds", "0.5"]) as url:
            load(url, texts, seconds=WARM_SECONDS, num_clients=config.num_clients)
            for number in range(config.num_runs):
                found = load(url, texts, seconds=config.seconds, num_clients=config.num_clients)
                yield _figures(f"run {number + 1} of {config.num_runs}", found)
            if config.num_switches:
                with ThreadPoolExecutor(1) as thread:
                    switching = thread.submit(_switch, store, snapshot, times=config.num_switches)
                    found = load(
                        url,
                        texts,
                        seconds=config.num_switches * SWITCH_SECONDS + WARM_SECONDS,
                        num_clients=config.num_clients,
                    )
                    switching.result()
                yield _figures(f"{config.num_switches} snapshots", found)


def serve_line(figures: ServeFigures) -> str:
    """One run as a line."""
    return (
        f"{figures.name}: {figures.requests_per_second:,.0f} requests/s, p50 {figures.p50_ms:.0f} "
        f"ms, p99 {figures.p99_ms:.0f} ms, {figures.num_errors:,} errors in "
        f"{figures.num_requests:,} requests, answers of {figures.num_snapshots} snapshots"
    )


@contextmanager
def _service(words: Sequence[str]) -> Iterator[str]:
    """A service and its URL, for the length of a block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "jobs.cli", "serve", *words, "--port", port, "--json"]
    with (
        ended_by_sigterm(),  # or the service would go on
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process,
    ):
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            if not line:
                raise ClipmillError(f"{' '.join(command)} ended with {process.wait()}")
            yield json.loads(line)["url"]
        finally:
            end(process)


def _switch(store: Store, snapshot: Snapshot, *, times: int) -> None:
    """Commit the same rows again and again."""
    for number in range(times):
        commit(store, replace(snapshot, number=number + 2, parent=number + 1))
        time.sleep(SWITCH_SECONDS)


def _figures(name: str, found: Load) -> ServeFigures:
    return ServeFigures(
        name=name,
        requests_per_second=found.requests_per_second,
        p50_ms=found.milliseconds(50),
        p99_ms=found.milliseconds(99),
        num_requests=len(found.seconds) + len(found.errors),
        num_errors=len(found.errors),
        num_snapshots=len(set(found.snapshots)),
    )
