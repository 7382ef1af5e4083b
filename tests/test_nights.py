"""Nights of all kinds, one after the other, against a model; all that is listed is right.

Drawn are catalogs and their changes, engines, retries, guards that trip and are accepted, kills at
any operation on the store, rollbacks, vacuums, and catalogs of earlier days. In most examples the
stages' own functions run in this process, one after the other; a few short ones have a real Ray.

    pytest tests/test_nights.py    # some seconds of it, the same each time
    NIGHTS_EXAMPLES=200 pytest --hypothesis-profile explore tests/test_nights.py
"""

import contextlib
import functools
import itertools
import os
import random
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, Phase, event, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from engine.backends.choice import load_encoder
from engine.backends.encoder import Encoder
from engine.build import load_or_build
from engine.checkpoint import find_checkpoint
from engine.images import ImageLimits
from engine.preprocess import decode_pixels
from engine.registry import Registry
from pipelines.catalog import CatalogConfig
from pipelines.cluster.resources import Resources
from pipelines.decode import RowLimits
from pipelines.embedding import EmbedConfig
from pipelines.engines import EngineChoice
from pipelines.errors import CatalogError, GuardError, StoreError, TooManyRejectsError
from pipelines.fetching.fetch_policy import FetchPolicy
from pipelines.indexes.manifest import INDEXES_DIR, index_dir
from pipelines.indexes.opening import open_index
from pipelines.lineage import GUARDS
from pipelines.nightly import NightlyConfig, run_night
from pipelines.schema import MODALITIES, RETRYABLE_REASONS, Modality
from pipelines.snapshots import Snapshot, read_snapshot, rollback, snapshot_numbers
from pipelines.store import Store
from pipelines.vacuum import Retention, vacuum
from tests.checkpoints import save_clip
from tests.interruptions import Interruption, Killed
from tests.nightly_model import (
    CAPTIONS,
    LARGE_CHANGES,
    MAX_TEXT_CHARS,
    ORDINARY_CHANGES,
    PICTURES,
    CatalogInMemory,
    Key,
    Model,
    Outcome,
    Place,
    Plan,
    State,
    Stored,
    may_be_reject,
)
from tests.stages_here import use_stages_here

# A failing example is told as it is: to make it shorter takes many more nights.
PROFILE = settings(
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)
MAX_REJECTS, MAX_DELETIONS, MIN_TO_TRIP = 0.1, 0.2, 20
# Of a unit vector's elements, over batches of other sizes.
TOLERANCE = 2e-5
RETRIES = ((), tuple(sorted(RETRYABLE_REASONS)), ("fetch_failed",))


class Engines:
    """Two engines, and what they make of contents when they are asked directly."""

    def __init__(self, engines_dir: Path, checkpoint_dirs: Sequence[Path]) -> None:
        self.uri = str(engines_dir)
        self.checkpoint_dirs = tuple(map(str, checkpoint_dirs))
        registry = Registry(self.uri)
        engines = [
            load_or_build(find_checkpoint(checkpoint), registry=registry)
            for checkpoint in self.checkpoint_dirs
        ]
        self.ids = tuple(engine.manifest.engine_id for engine in engines)
        self._encoders: dict[str, Encoder] = {
            engine.manifest.engine_id: load_encoder(
                engine, backend="onnxruntime", registry=registry, num_threads=1
            )
            for engine in engines
        }
        self.embedding = functools.cache(self._embedding)

    def _embedding(self, engine_id: str, modality: Modality, content: Any) -> np.ndarray:
        encoder = self._encoders[engine_id]
        if modality == "text":
            return encoder.encode_texts([content])[0]
        preprocessing = encoder.manifest.preprocessing
        pixels = decode_pixels(content, preprocessing=preprocessing, limits=ImageLimits())
        return encoder.encode_images(pixels[None])[0]


@pytest.fixture(scope="module")
def engines(
    tmp_path_factory: pytest.TempPathFactory, checkpoint_dir: Path, engines_dir: Path
) -> Engines:
    return Engines(engines_dir, [checkpoint_dir, save_clip(tmp_path_factory.mktemp("other"))])


Expected = dict[Place, Stored | set[Outcome]]


class Nights(RuleBasedStateMachine):
    """A catalog, its store, and what the store must hold."""

    engines: Engines
    """Set by the test."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="nights-"))
        self.store = Store(str(self.folder / "store"))
        self.listed: dict[int, State] = {}
        self.deliveries: list[Any] = []
        self.by_version = False

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    @initialize(integer_keys=st.booleans(), carries=st.booleans(), seed=st.integers(0, 2**16))
    def begin(self, integer_keys: bool, carries: bool, seed: int) -> None:
        draw = random.Random(seed)
        self.catalog = CatalogInMemory(folder=self.folder, integer_keys=integer_keys)
        self.catalog.files = {"b.parquet": [], "d.parquet": [], "f.parquet": []}
        self.model = Model(carries=carries)
        self.change(["fill", "duplicate", "elsewhere"], draw)

    @property
    def parent(self) -> State | None:
        return self.listed[max(self.listed)] if self.listed else None

    def change(self, changes: Sequence[str], draw: random.Random) -> None:
        for what in changes:
            self.catalog.change(what, draw)
        self.catalog.write()
        self.deliveries.append(self.catalog.delivery())

    # What people and schedulers do

    @rule(
        earlier=st.none() | st.none() | st.integers(1, 4),
        changes=st.lists(st.sampled_from(ORDINARY_CHANGES * 2 + LARGE_CHANGES), max_size=4),
        seed=st.integers(0, 2**16),
        by_version=st.sampled_from([None] * 8 + [False, True]),
        engine=st.sampled_from([0, 0, 0, 1]),
        retry=st.sampled_from(RETRIES),
        accepted=st.sampled_from([(), (), GUARDS, ("rejects",), ("deletions", "neighbours")]),
        kill=st.none() | st.tuples(st.integers(0, 20), st.booleans()),
    )
    def night(
        self,
        earlier: int | None,
        changes: list[str],
        seed: int,
        by_version: bool | None,
        engine: int,
        retry: tuple[str, ...],
        accepted: Sequence[Any],
        kill: tuple[int, bool] | None,
    ) -> None:
        """The same catalog again, or one of an earlier day, or another; then a night of it."""
        if earlier is not None:
            self.catalog.deliver(self.deliveries[-1 - earlier % len(self.deliveries)])
        self.change(changes, random.Random(seed))
        self.by_version = self.by_version if by_version is None else by_version
        self.run(engine=engine, retry=retry, accepted=accepted, kill=kill)

    @rule(engine=st.sampled_from([0, 0, 0, 1]))
    def night_with_all_accepted(self, engine: int) -> None:
        self.run(engine=engine, retry=(), accepted=GUARDS, kill=None)
        assert self.listed or not self.catalog.rows

    def run(
        self,
        *,
        engine: int,
        retry: tuple[str, ...],
        accepted: Sequence[Any],
        kill: tuple[int, bool] | None,
    ) -> None:
        plan = Plan(
            files=self.catalog.identity(),
            engine_id=self.engines.ids[engine],
            by_version=self.by_version,
        )
        parent, items = self.parent, self.catalog.items()
        if self.catalog.rows or parent:
            expected = self.model.begin(plan, items, parent=parent, retried=retry)
        config = NightlyConfig(
            embed=EmbedConfig(
                catalog=CatalogConfig(
                    uri=str(self.catalog.catalog_dir),
                    version_column="version" if self.by_version else None,
                    carry_columns=("price",) if self.model.carries else (),
                ),
                store_uri=self.store.uri,
                engine=EngineChoice(
                    checkpoint=self.engines.checkpoint_dirs[engine], engines_uri=self.engines.uri
                ),
                limits=RowLimits(
                    max_text_chars=MAX_TEXT_CHARS, fetch=FetchPolicy(allow=("file:",))
                ),
                resources=Resources(rows_per_file=8),
                retry=retry,
            ),
            accepted=tuple(accepted),
        )
        before = snapshot_numbers(self.store)
        interrupted = contextlib.nullcontext() if kill is None else Interruption(*kill)
        committed = None
        try:
            with interrupted:
                committed = run_night(config).embedded.committed
        except Killed:
            event("killed")
        except CatalogError:
            assert not self.catalog.rows
            assert not parent
        except TooManyRejectsError:
            assert "rejects" not in accepted
            assert self.stopped(expected, parent, retry)[1]
            event("stopped by rejects")
        except GuardError as error:
            tripped = set(re.findall(r"- (\w+)[: ]", str(error)))
            assert tripped.isdisjoint(accepted)
            must, may = self.tripped(expected, plan, parent)
            assert must - set(accepted) <= tripped <= may
            event(f"stopped by guards: {', '.join(sorted(tripped))}")
        new = snapshot_numbers(self.store)[len(before) :]
        if committed is not None:
            assert committed == bool(new)
        if new:
            (number,) = new
            self.listed[number] = self.state(number, plan, expected)
            assert not self.stopped(expected, parent, retry)[0] or "rejects" in accepted
            assert self.tripped(expected, plan, parent)[0] <= set(accepted)
        if committed is not None:
            # All that was to be done is done, and nothing is committed that says nothing new.
            current = self.parent
            assert current
            assert current.plan == plan
            assert current.rows.keys() == expected.keys()
            assert current.whole_rows == self.catalog.whole_row_rejects()
            assert committed == (current != parent)
            event("committed" if committed else "unchanged")

    def stopped(
        self, expected: Expected, parent: State | None, retry: Sequence[str]
    ) -> tuple[bool, bool]:
        """Whether so much that is tried is rejected that the run must, or may, have stopped."""
        tried = {place: of for place, of in expected.items() if isinstance(of, set)}
        num_retried = 0
        for place in tried:
            stored = parent.rows.get(place) if parent else None
            num_retried += bool(stored and stored.reason in retry)
        must, may = np.sum([may_be_reject(of) for of in tried.values()] or [(0, 0)], axis=0)
        bound = max(MAX_REJECTS * len(tried), MIN_TO_TRIP - 1)
        return must > bound + num_retried, may > bound

    def tripped(
        self, expected: Expected, plan: Plan, parent: State | None
    ) -> tuple[set[str], set[str]]:
        """Guards that must, and that may have tripped."""
        must, may = set(), set()
        num_keys = len(expected) // len(MODALITIES)
        for modality in MODALITIES:
            of = [of for place, of in expected.items() if place[0] == modality]
            for num, guards in zip(
                np.sum([may_be_reject(one) for one in of] or [(0, 0)], axis=0),
                (must, may),
                strict=True,
            ):
                if num >= MIN_TO_TRIP and num > MAX_REJECTS * num_keys:
                    guards.add("rejects")
        num_unkeyed = len(self.catalog.whole_row_rejects())
        is_many = num_unkeyed > MAX_REJECTS * len(self.catalog.rows)
        if num_unkeyed and (not expected or (is_many and num_unkeyed >= MIN_TO_TRIP)):
            must.add("rejects")
        if parent:
            keys = {key for _, key in parent.rows}
            num_gone = len(keys - {key for _, key in expected})
            if num_gone > MAX_DELETIONS * len(keys) and (num_gone >= MIN_TO_TRIP or not expected):
                must.add("deletions")
            if plan.engine_id != parent.plan.engine_id:
                may.add("neighbours")
        return must, may | must

    def state(self, number: int, plan: Plan, expected: Expected) -> State:
        """What a snapshot that was just committed holds, if that is what was to be expected."""
        snapshot = read_snapshot(self.store, number)
        assert snapshot.engine.engine_id == plan.engine_id
        rows, whole_rows = read_rows(Path(self.store.uri), snapshot)
        assert rows.keys() == expected.keys()
        for place, of in expected.items():
            found = rows[place]
            if isinstance(of, Stored):
                assert found == of, f"{place} was to stay as it was"
                continue
            row = self.catalog.items()[place[1]]
            assert found.fingerprint == row.fingerprint(place[0], by_version=plan.by_version)
            assert any(self.is_of(found, outcome, place[0], plan) for outcome in of), (
                f"{place}: {found.reason}, price {found.price}; expected one of {of}"
            )
        names = {str(self.catalog.catalog_dir / name) for name, *_ in plan.files}
        assert snapshot.catalog.files.keys() == names
        assert snapshot.catalog.num_keys == len(self.catalog.items())
        return State(
            rows=rows,
            whole_rows=frozenset(whole_rows),
            plan=plan,
            engine=snapshot.engine,
            catalog=snapshot.catalog,
        )

    def is_of(self, found: Stored, outcome: Outcome, modality: Modality, plan: Plan) -> bool:
        if found.reason or outcome.reason:
            return found.reason == outcome.reason
        if found.engine_id != plan.engine_id:
            return False
        if self.model.carries and found.price != outcome.price:
            return False
        right = self.engines.embedding(plan.engine_id, modality, outcome.content)
        return np.allclose(np.frombuffer(found.vector, np.float32), right, atol=TOLERANCE)

    @precondition(lambda self: self.listed)
    @rule(number=st.integers(0, 9), kill=st.none() | st.tuples(st.just(0), st.booleans()))
    def rollback(self, number: int, kill: tuple[int, bool] | None) -> None:
        earlier = sorted(self.listed)[-1 - number % len(self.listed)]
        newest = max(self.listed)
        same = {file.path for file in read_snapshot(self.store, earlier).files} == {
            file.path for file in read_snapshot(self.store, newest).files
        }
        try:
            with contextlib.nullcontext() if kill is None else Interruption(*kill):
                assert rollback(self.store, earlier).number == newest + 1
            assert not same
        except StoreError:
            assert same
        except Killed:
            pass
        if newest + 1 in snapshot_numbers(self.store):
            self.listed[newest + 1] = self.listed[earlier]

    @precondition(lambda self: self.listed)
    @rule(keep=st.integers(1, 4), kill=st.none() | st.tuples(st.integers(0, 30), st.booleans()))
    def vacuum(self, keep: int, kill: tuple[int, bool] | None) -> None:
        kept = sorted(self.listed)[-keep:]
        try:
            with contextlib.nullcontext() if kill is None else Interruption(*kill):
                vacuum(self.store, Retention(num_snapshots=keep, min_age_hours=0))
        except Killed:
            left = snapshot_numbers(self.store)
            assert set(kept) <= set(left) <= set(self.listed)
            kept = left
        else:
            snapshots = [read_snapshot(self.store, number) for number in kept]
            needed = {index_dir(of, modality=name) for of in snapshots for name in MODALITIES}
            assert {f"{INDEXES_DIR}/{name}" for name in self.store.names(INDEXES_DIR)} == needed
        self.listed = {number: self.listed[number] for number in kept}

    # What a reader sees, after each of them

    @invariant()
    def all_is_right(self) -> None:
        """Files that are listed are there, the current ones as committed, and so is the index."""
        assert snapshot_numbers(self.store) == sorted(self.listed)
        for number, state in self.listed.items():
            snapshot = read_snapshot(self.store, number)
            assert (snapshot.engine, snapshot.catalog) == (state.engine, state.catalog)
            for file in snapshot.files:
                assert Path(self.store.full_path(file.path)).stat().st_size == file.num_bytes
        if self.listed:
            rows, whole_rows = read_rows(Path(self.store.uri), snapshot)
            assert rows == state.rows
            assert whole_rows == state.whole_rows
            for modality in MODALITIES:
                self.check_index(snapshot, modality)

    def check_index(self, snapshot: Snapshot, modality: Modality) -> None:
        index = open_index(self.store, snapshot, modality=modality)
        ids = np.flatnonzero(np.unpackbits(index.rows.alive(), bitorder="little"))
        keys = index.rows.keys_of(ids).to_pylist()
        vectors = [index.vector_of(int(row_id)) for row_id in ids]
        found: dict[Key, bytes] = {
            key: vector.tobytes() for key, vector in zip(keys, vectors, strict=True)
        }
        assert len(found) == len(keys)
        assert found == {
            key: stored.vector
            for (of, key), stored in self.listed[snapshot.number].rows.items()
            if of == modality and stored.vector is not None
        }
        if found:
            scores, nearest = index.search(np.stack(vectors), num_hits=1)
            assert set(nearest[:, 0].tolist()) <= set(ids.tolist())
            assert np.all(scores > 1 - TOLERANCE)


def read_rows(
    store_dir: Path, snapshot: Snapshot
) -> tuple[dict[Place, Stored], set[tuple[str, Key | None, str, int]]]:
    """Rows, and rejects of whole rows, as anyone reads Parquet; none may be there twice."""
    rows: dict[Place, Stored] = {}
    whole_rows: set[tuple[str, Key | None, str, int]] = set()
    for file in snapshot.files:
        table = pq.read_table(store_dir / file.path)
        assert table.num_rows == file.num_rows > 0
        for row in table.to_pylist():
            if row["modality"] is None:
                whole_row = (row["reason"], row["key"], row["source_file"], row["source_row"])
                assert whole_row not in whole_rows
                whole_rows.add(whole_row)
                continue
            vector = row.get("embedding")
            assert (row["modality"], row["key"]) not in rows, f"{row['key']} is there twice"
            rows[row["modality"], row["key"]] = Stored(
                fingerprint=row["fingerprint"],
                reason=row.get("reason"),
                vector=None if vector is None else np.array(vector, np.float32).tobytes(),
                price=row.get("price"),
                engine_id=row.get("engine_id"),
            )
    return rows, whole_rows


@pytest.fixture
def nights(engines: Engines, local_ray: None) -> type[Nights]:
    return type("Nights", (Nights,), {"engines": engines})


def test_contents_and_engines_can_be_told_apart(engines: Engines):
    """Or else the others say less than they seem to."""
    for modality, contents in (("image", PICTURES), ("text", CAPTIONS)):
        vectors = [
            engines.embedding(engine_id, modality, content)
            for engine_id in engines.ids
            for content in contents
        ]
        for one, other in itertools.combinations(vectors, 2):
            assert one.shape != other.shape or np.abs(one - other).max() > 100 * TOLERANCE


def test_whatever_the_nights_every_key_is_there_once_and_right(
    nights: type[Nights], monkeypatch: pytest.MonkeyPatch
):
    use_stages_here(monkeypatch)
    num_examples = int(os.environ.get("NIGHTS_EXAMPLES", "5"))
    run_state_machine_as_test(
        nights, settings=settings(PROFILE, max_examples=num_examples, stateful_step_count=20)
    )


def test_so_it_is_with_a_real_ray(nights: type[Nights]):
    num_examples = -(-int(os.environ.get("NIGHTS_EXAMPLES", "1")) // 50)
    run_state_machine_as_test(
        nights, settings=settings(PROFILE, max_examples=num_examples, stateful_step_count=8)
    )
