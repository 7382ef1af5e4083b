"""Nights that are killed at any moment, on three nodes of this machine, and what comes of them."""

import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from jobs.demo.run import CHECKPOINT_DIR
from pipelines import schema
from pipelines.indexes.manifest import index_dir
from pipelines.indexes.opening import open_index
from pipelines.schema import MODALITIES, Modality
from pipelines.snapshots import Snapshot, current_snapshot
from pipelines.store import Store
from pipelines.vacuum import Retention, vacuum
from tests import encoded_rows, image_files
from tests.catalogs import scene_rows
from tests.ray_nodes import RayNodes, ray_nodes

ROOT = Path(__file__).resolve().parent.parent
MAX_RUNS = 5
RUN_SECONDS = 300
# From when a night begins to index until its process is gone, on two cores.
LATE_SECONDS = 4.0
NUM_HITS = 10
ROWS_PER_GROUP = 64
# Of an index's answers: its products are summed in the order of its rows, which is that of files.
SCORE_TOLERANCE = 1e-5

# Workers without a task, and agents and actors by which Ray does its own work.
RAYS_OWN = re.compile(r"ray::(IDLE|_|\w+Agent$|ActorLocationTracker)")

Kind = Literal["driver", "worker", "raylet"]
KINDS: tuple[Kind, ...] = ("driver", "worker", "raylet")
# Without carried columns content that moved is copied, with them all is embedded.
OPTIONS: dict[str, tuple[str, ...]] = {"copies": (), "carried": ("--carry", "price")}
# Of each stored row, by kind of file, sorted by modality and key: all columns there are.
SORTED_BY = {
    "embeddings": [(schema.MODALITY, "ascending"), (schema.KEY, "ascending")],
    "rejects": [
        (schema.MODALITY, "ascending"),
        (schema.SOURCE_FILE, "ascending"),
        (schema.SOURCE_ROW, "ascending"),
    ],
}
NO_ROWS = schema.rejects_schema(key_type=pa.string()).empty_table()
# Of a manifest: what differs between two runs of the same work. The plan counts what an earlier
# attempt left, guards draw their samples by the names of files, which are drawn by lot.
UNEQUAL = ("created_at", "run_id", "files", "lineage")


@dataclass(frozen=True, kw_only=True)
class State:
    """What a store holds, as far as it does not depend on the run."""

    manifest: dict[str, Any]
    """All of the snapshot but UNEQUAL."""
    rows: dict[str, pa.Table]
    """Kind of file -> all rows, sorted."""
    vectors: dict[Modality, dict[Any, bytes]]
    """Key -> embedding, as the index has it."""
    answers: dict[Modality, list[tuple[list[float], set[Any]]]]
    """To every 10th key's embedding as a query, in order: scores, and the keys that are certain."""


def state_of(store_dir: Path | str) -> State:
    """Read a store; fails if a key is there twice."""
    store = Store(str(store_dir))
    snapshot = current_snapshot(store)
    assert snapshot is not None
    manifest = dataclasses.asdict(snapshot)
    for name in UNEQUAL:
        del manifest[name]
    rows = {kind: _rows(store, snapshot, kind=kind) for kind in SORTED_BY}
    places = [
        place
        for table in rows.values()
        for place in zip(
            table[schema.MODALITY].to_pylist(), table[schema.KEY].to_pylist(), strict=True
        )
        if place[0] is not None
    ]
    assert len(places) == len(set(places)) == 2 * snapshot.catalog.num_keys
    vectors, answers = {}, {}
    for modality in MODALITIES:
        index = open_index(store, snapshot, modality=modality)
        ids = np.flatnonzero(np.unpackbits(index.rows.alive(), bitorder="little"))
        keys = index.rows.keys_of(ids).to_pylist()
        by_key = {key: index.vector_of(int(row_id)) for key, row_id in zip(keys, ids, strict=True)}
        vectors[modality] = {key: vector.tobytes() for key, vector in by_key.items()}
        queries = np.stack([by_key[key] for key in sorted(by_key)[::NUM_HITS]])
        answers[modality] = [
            _certain(scores, index.rows.keys_of(hits).to_pylist())
            for scores, hits in zip(*index.search(queries, num_hits=NUM_HITS), strict=True)
        ]
    return State(manifest=manifest, rows=rows, vectors=vectors, answers=answers)


def check_same(found: State, expected: State) -> None:
    """Fails with what differs."""
    assert found.manifest == expected.manifest
    for kind, rows in expected.rows.items():
        assert found.rows[kind].schema == rows.schema
        for name in rows.column_names:
            # Floats by their bits: of NaN and zero, other bits would be equal or unequal.
            assert _bits(found.rows[kind][name]) == _bits(rows[name]), f"{kind}: {name} differs"
    assert found.vectors == expected.vectors
    for modality, answers in expected.answers.items():
        for (scores, keys), (want_scores, want_keys) in zip(
            found.answers[modality], answers, strict=True
        ):
            assert np.allclose(scores, want_scores, rtol=0, atol=SCORE_TOLERANCE)
            assert keys == want_keys


def _rows(store: Store, snapshot: Snapshot, *, kind: Any) -> pa.Table:
    tables = []
    for stored in snapshot.files_of(kind):
        with store.open(stored.path) as file:
            tables.append(pq.read_table(file))
        assert tables[-1].num_rows == stored.num_rows
    rows = pa.concat_tables(tables) if tables else NO_ROWS
    return rows.sort_by(SORTED_BY[kind]).combine_chunks()


def _bits(column: pa.ChunkedArray) -> list[Any]:
    if pa.types.is_fixed_size_list(column.type):
        array = column.combine_chunks()
        vectors = array.flatten().to_numpy().reshape(len(array), -1)
        return [vector.tobytes() for vector in vectors]
    return list(column.to_pylist())


def _certain(scores: Any, keys: Sequence[Any]) -> tuple[list[float], set[Any]]:
    """Scores, and keys of hits that are clearly before the last: equal ones come in any order."""
    last = scores[-1] + 2 * SCORE_TOLERANCE
    certain = {key for key, score in zip(keys, scores, strict=True) if score > last}
    return [float(score) for score in scores], certain


def orphans_after_vacuum(store_dir: Path) -> list[str]:
    """Files that nothing names once all but the current snapshot was vacuumed."""
    store = Store(str(store_dir))
    vacuum(store, Retention(num_snapshots=1, min_age_hours=0))
    snapshot = current_snapshot(store)
    assert snapshot is not None
    named = {snapshot.path, *(file.path for file in snapshot.files)}
    folders = tuple(f"{index_dir(snapshot, modality=of)}/" for of in snapshot.modalities)
    there = {
        path.relative_to(store_dir).as_posix() for path in store_dir.rglob("*") if path.is_file()
    }
    assert named <= there
    return sorted(
        path
        for path in there - named
        # Reports of runs stay; hidden files in their place are no reports.
        if not (path.startswith(("runs/", *folders)) and "/." not in path)
    )


def write_catalogs(folder: Path, *, num_rows: int) -> Callable[[], None]:
    """Write yesterday's catalog; what is returned makes today's of it.

    Of four files one stays; in one every other row has other content; in one all keys are new; one
    gives way to new rows, of which some are damaged, twins, or without a key or another's.
    """
    rows = [
        {**row, "price": number / 7} for number, row in enumerate(scene_rows(num_rows * 7 // 4))
    ]
    quarter = num_rows // 4
    parts = [rows[number * quarter : (number + 1) * quarter] for number in range(4)]
    fresh = rows[num_rows:]
    folder.mkdir(parents=True)
    for number, part in enumerate(parts):
        _write(folder / f"part-{number}.parquet", part)

    def change() -> None:
        contents = ("image", "text")
        _write(
            folder / "part-1.parquet",
            [
                {**row, **{name: fresh[place][name] for name in contents}} if place % 2 else row
                for place, row in enumerate(parts[1])
            ],
        )
        _write(
            folder / "part-2.parquet",
            [{**row, "key": f"moved-{row['key']}"} for row in parts[2]],
        )
        added = [{**row, "key": f"new-{row['key']}"} for row in fresh[quarter:]]
        for place, damage in enumerate(
            (
                {"image": None},
                {"image": b""},
                {"image": b"no image"},
                {"image": image_files.truncated_jpeg()},
                {"text": None},
                {"text": " "},
                {"key": None},
                {"key": added[0]["key"]},
                {"image": b"no image", "text": None},
            )
        ):
            added[9 * place + 5] = {**added[9 * place + 5], **damage}
        twins = [
            {**row, "key": f"twin-{place}"}
            for place, row in enumerate([*added[10:20], *parts[0][:10]])
        ]
        _write(folder / "part-3.parquet", [*added, *twins])

    return change


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    columns = pa.schema(
        {"key": pa.string(), "image": pa.binary(), "text": pa.string(), "price": pa.float64()}
    )
    pq.write_table(
        pa.Table.from_pylist(list(rows), schema=columns), path, row_group_size=ROWS_PER_GROUP
    )


@dataclass(frozen=True, kw_only=True)
class Killed:
    """What came of one kill."""

    kind: Kind
    """Of what."""
    share: float
    """Of an undisturbed run's time, at which it was to be; of LATE_SECONDS, if late."""
    where: str
    """What the store had by then."""
    victim: str
    """What the process was called."""
    codes: tuple[int, ...]
    """How each run ended."""
    said: str
    """The last line that a run which died wrote, if one did by itself."""
    num_redone: int
    """Rows that were begun to be encoded, beyond those of an undisturbed run."""


class KilledNights:
    """One night after another from the same state, each killed once."""

    def __init__(
        self, folder: Path, *, names: Sequence[str], num_rows: int, nodes: RayNodes, log: Path
    ) -> None:
        """Embed yesterday's catalog, and today's undisturbed.

        Args:
            folder: For all that is written.
            names: Of OPTIONS, those to be run with.
            num_rows: Of yesterday's catalog.
            nodes: Where it is done.
            log: Of `encoded_rows`.
        """
        self._folder, self._nodes, self._log = folder, nodes, log
        self._num_nights = 0
        change = write_catalogs(folder / "catalog", num_rows=num_rows)
        for name in names:
            self._finish(self._base(name), name=name)
        change()
        self.seconds: dict[str, float] = {}
        self.num_due: dict[str, int] = {}
        self.expected: dict[str, State] = {}
        for name in names:
            store_dir = self._copy(name)
            with encoded_rows.counted(log) as batches:
                started = time.monotonic()
                self._finish(store_dir, name=name)
                self.seconds[name] = time.monotonic() - started
            self.num_due[name] = sum(batches)
            self.expected[name] = state_of(store_dir)
            assert orphans_after_vacuum(store_dir) == []

    def kill(
        self,
        kind: Kind,
        *,
        name: str,
        share: float,
        rng: np.random.Generator,
        is_late: bool = False,
    ) -> Killed:
        """Kill one night at a share of its time, finish it, and compare it with an undisturbed one.

        Args:
            kind: What is killed.
            name: Of OPTIONS.
            share: 0 to 1, of an undisturbed run's time.
            rng: Chooses among workers and nodes.
            is_late: The share is of LATE_SECONDS, from when it begins to index.
        """
        while True:
            store_dir = self._copy(name)
            with encoded_rows.counted(self._log) as batches:
                started = time.monotonic()
                night = self._start(store_dir, name=name)
                try:
                    at = started + share * self.seconds[name]
                    if is_late:
                        until = started + RUN_SECONDS
                        while night.poll() is None and not _is_late(store_dir):
                            assert time.monotonic() < until, "still not indexing"
                            time.sleep(0.01)
                        at = time.monotonic() + share * LATE_SECONDS
                    where, victim = self._kill(kind, night, store_dir, at=at, rng=rng)
                finally:
                    codes, errors = self._until_done(night, store_dir, name=name)
            took = time.monotonic() - started
            is_over = took < at - started
            # On a shared machine nights take now more, now less.
            self.seconds[name] = took if len(codes) == 1 else self.seconds[name]
            if victim is not None:
                break
            # Where the night was not over, it had no worker any more.
            share = share if is_over and not is_late else float(rng.uniform())
            shutil.rmtree(store_dir)
        check_same(state_of(store_dir), self.expected[name])
        left = orphans_after_vacuum(store_dir)
        assert left == [], f"orphans: {left}"
        check_same(state_of(store_dir), self.expected[name])
        shutil.rmtree(store_dir)
        return Killed(
            kind=kind,
            share=share,
            where=where,
            victim=victim,
            codes=tuple(codes),
            said=errors[0] if errors else "",
            num_redone=sum(batches) - self.num_due[name],
        )

    def _kill(
        self,
        kind: Kind,
        night: subprocess.Popen[str],
        store_dir: Path,
        *,
        at: float,
        rng: np.random.Generator,
    ) -> tuple[str, str | None]:
        """What the store had, and what was killed; None: nothing was there to be killed."""
        time.sleep(max(0, at - time.monotonic()))
        while night.poll() is None:
            victim = self._victim(kind, night, rng=rng)
            if victim is not None:
                pid, called = victim
                where = _where(store_dir)
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:  # it ended meanwhile
                    continue
                if kind == "raylet":
                    self._nodes.replace(pid)
                return where, called
            time.sleep(0.02)
        return "", None

    def _victim(
        self, kind: Kind, night: subprocess.Popen[str], *, rng: np.random.Generator
    ) -> tuple[int, str] | None:
        if kind == "driver":
            return night.pid, "driver"
        if kind == "raylet":
            return int(rng.choice(self._nodes.worker_pids)), "raylet"
        workers = [
            (worker.pid, called)
            for worker, called in _workers([self._nodes.head_pid, *self._nodes.worker_pids])
            if not RAYS_OWN.match(called)
        ]
        return workers[rng.integers(len(workers))] if workers else None

    def _until_done(
        self, night: subprocess.Popen[str], store_dir: Path, *, name: str
    ) -> tuple[list[int], list[str]]:
        """Exit codes, and last lines of what those wrote that were not killed and failed."""
        codes: list[int] = []
        errors: list[str] = []
        while True:
            code, said = _ended(night)
            codes.append(code)
            if code == 0:
                return codes, errors
            if code != -signal.SIGKILL:
                errors.append(said)
            assert len(codes) < MAX_RUNS, f"still not done: {codes}: {errors}"
            night = self._start(store_dir, name=name)

    def _base(self, name: str) -> Path:
        return self._folder / f"base-{name}"

    def _copy(self, name: str) -> Path:
        self._num_nights += 1
        return shutil.copytree(self._base(name), self._folder / f"store-{self._num_nights}")

    def _finish(self, store_dir: Path, *, name: str) -> None:
        code, said = _ended(self._start(store_dir, name=name))
        assert code == 0, said

    def _start(self, store_dir: Path, *, name: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "jobs.nightly", "--json"]
        command += ["--catalog", str(self._folder / "catalog"), "--store", str(store_dir)]
        command += ["--checkpoint", str(CHECKPOINT_DIR), "--engines", str(self._folder / "engines")]
        command += ["--address", self._nodes.gcs, "--num-encoders", "2"]
        command += ["--batch-rows", "16", "--rows-per-file", "64", "--max-deletions", "1"]
        return subprocess.Popen(
            [*command, *OPTIONS[name]],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )


def _ended(night: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and last line of stderr."""
    try:
        _, said = night.communicate(timeout=RUN_SECONDS)
    except subprocess.TimeoutExpired:
        night.kill()
        night.communicate()
        raise
    return night.returncode, said.strip().splitlines()[-1] if said.strip() else ""


def _where(store_dir: Path) -> str:
    """How far a night has come, by what it has written beside yesterday's."""
    if (store_dir / "snapshots/00000002.json").exists():
        return "committed"
    indexes = len(list(store_dir.glob("indexes/*")))
    if indexes > len(MODALITIES):
        return "indexing"
    plans = len(list(store_dir.glob("embeddings/*")))
    return "embedding or guards" if plans > 1 else "start and plan"


def _is_late(store_dir: Path) -> bool:
    return _where(store_dir) in ("indexing", "committed")


def _workers(raylets: Sequence[int]) -> Iterator[tuple[psutil.Process, str]]:
    """Workers of these raylets, with what they call themselves."""
    for raylet in raylets:
        try:
            for child in psutil.Process(raylet).children():
                words = child.cmdline()
                if words and words[0].startswith("ray::"):
                    yield child, words[0]
        except psutil.NoSuchProcess:
            continue


@contextmanager
def killed_nights(
    folder: Path, *, num_rows: int, names: Sequence[str] = tuple(OPTIONS)
) -> Iterator[KilledNights]:
    """Three nodes, and nights on them that can be killed."""
    log = folder / "encoded-rows"
    environment = {
        **encoded_rows.environment(log),
        # A raylet that is gone is noticed after seconds, not after half a minute.
        "RAY_health_check_initial_delay_ms": "1000",
        "RAY_health_check_period_ms": "1000",
        "RAY_health_check_failure_threshold": "3",
        # On a machine with other work, workers that come last would take minutes.
        "RAY_worker_niceness": "0",
        # Nor workers that nobody asked for, of which each takes seconds to start.
        "RAY_enable_worker_prestart": "0",
        "RAY_prestart_worker_first_driver": "0",
    }
    with ray_nodes(3, takes_jobs=False, environment=environment) as nodes:
        yield KilledNights(folder, names=names, num_rows=num_rows, nodes=nodes, log=log)
