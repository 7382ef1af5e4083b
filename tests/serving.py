"""A searcher with known answers, and the service around it, in this process."""

import dataclasses
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from jobs.serving.app import make_app
from jobs.serving.live import Opened
from jobs.serving.options import ServiceConfig, ServiceLimits
from pipelines.errors import QueryError
from pipelines.indexes.filters import Condition, UnknownColumnError
from pipelines.indexes.manifest import IndexManifest
from pipelines.indexes.queries import Query
from pipelines.indexes.shown import shown
from pipelines.search import Answer, Hit, UnknownKeyError
from pipelines.snapshots import CatalogRecord, Snapshot, commit
from pipelines.store import Store
from tests.stored import index_manifest, make_snapshot
from tests.waiting import WAIT_SECONDS

COLUMNS = {"name": "string", "price": "number", "stock": "integer", "new": "boolean"}
COMPARE = {
    "eq": lambda a, b: a == b,
    "in": lambda a, b: a in b,
    "ge": lambda a, b: a >= b,
    "gt": lambda a, b: a > b,
    "le": lambda a, b: a <= b,
    "lt": lambda a, b: a < b,
}


def _set_event() -> threading.Event:
    event = threading.Event()
    event.set()
    return event


@dataclass
class WordSearcher:
    """Ranks rows by the share of the query's words in their names; a picture's word is its bytes'
    first ten, a key's words are its name's."""

    rows: Mapping[str | int, Mapping[str, Any]]
    snapshot: Snapshot
    modality: str = "image"
    columns: Mapping[str, str] = field(default_factory=lambda: COLUMNS)
    build_id: str = "first"
    index_manifest: IndexManifest = field(
        default_factory=lambda: index_manifest(image=0.97, text=0.96)
    )
    begun: threading.Event = field(default_factory=threading.Event)
    """Set by the first search."""
    may_end: threading.Event = field(default_factory=_set_event)
    """What searches wait for."""
    batch_sizes: list[int] = field(default_factory=list)

    @property
    def num_rows(self) -> int:
        return len(self.rows)

    def columns_of(self, key: str | int) -> Mapping[str, Any] | None:
        return self.rows.get(key)

    def check(self, queries: Sequence[Query]) -> None:
        for query in queries:
            for part in query.parts:
                if part.key is not None:
                    self._share(part, {"name": ""})

    def search(
        self, queries: Sequence[Query], *, num_hits: int, where: Sequence[Condition] = ()
    ) -> list[Answer]:
        self.batch_sizes.append(len(queries))
        self.begun.set()
        assert self.may_end.wait(WAIT_SECONDS)
        for condition in where:
            if condition.column not in self.columns:
                raise UnknownColumnError(f"no column {shown(condition.column)}")
        return [self._answer(query, num_hits=num_hits, where=where) for query in queries]

    def _answer(self, query: Query, *, num_hits: int, where: Sequence[Condition]) -> Answer:
        scores = dict.fromkeys(self.rows, 0.0)
        asked_keys = {self._key(part.key) for part in query.parts}
        for part in query.parts:
            if part.text == "boom":
                raise RuntimeError("a bug")
            for key, row in self.rows.items():
                scores[key] += part.weight * self._share(part, row)
        allowed = [
            key
            for key, row in self.rows.items()
            if key not in asked_keys
            and all(_holds(condition, row[condition.column]) for condition in where)
        ]
        ranked = sorted(allowed, key=lambda key: -scores[key])[:num_hits]
        hits = tuple(Hit(key=key, score=scores[key], columns=self.rows[key]) for key in ranked)
        return Answer(hits=hits, notes=(), snapshot=self.snapshot.number)

    def _key(self, key: Any) -> Any:
        """As the real one does: text for an integer, which browsers lose digits of."""
        is_text = self.snapshot.key_type == "int64" and isinstance(key, str)
        return int(key) if is_text else key

    def _share(self, part: Any, row: Mapping[str, Any]) -> float:
        if part.key is not None:
            key = self._key(part.key)
            if key not in self.rows:
                raise UnknownKeyError(f"key {shown(part.key)} is not in the store")
            words = str(self.rows[key]["name"]).split()
        elif part.image is not None:
            words = ["ring"]
        elif part.vector is not None:
            raise QueryError("vectors are of 4 dimensions")
        else:
            words = part.text.split()
        return sum(word in str(row["name"]).split() for word in words) / len(words)


def _holds(condition: Condition, value: Any) -> bool:
    """As the real filters do: text that is compared with a number is read as one."""
    wanted = condition.value
    if isinstance(wanted, str) and not isinstance(value, str):
        wanted = type(value)(wanted)
    return bool(COMPARE[condition.operator](value, wanted))


def shop_rows(num_rows: int, *, first: int = 0) -> dict[str | int, dict[str, Any]]:
    """Rows `k0000`, ...: every third a ring, in one of four colours."""
    colours, things = ("red", "blue", "green", "amber"), ("ring", "cup", "lamp")
    return {
        f"k{n:04d}": {
            "name": f"{colours[n % 4]} {things[n % 3]}",
            "price": 5.0 + n,
            "stock": n,
            "new": n % 2 == 0,
        }
        for n in range(first, first + num_rows)
    }


class Shop:
    """A store of snapshots without embeddings, and the opener of what is searched in each."""

    def __init__(self, folder: Path, *, catalog: Path | None = None, num_rows: int = 12) -> None:
        self.store = Store(str(folder / "store"))
        self.catalog = catalog
        self.searchers: dict[int, WordSearcher] = {}
        self.errors: dict[int, Exception] = {}
        self.num_opened = 0
        self.among: tuple[Any, ...] = ("image",)
        self.commit(shop_rows(num_rows))

    def commit(self, rows: Mapping[str | int, Mapping[str, Any]], **changes: Any) -> int:
        number = len(self.searchers) + 1
        snapshot = make_snapshot([], number=number, **changes)
        catalog = CatalogRecord(
            uri=str(self.catalog or self.store.uri),
            num_rows=len(rows),
            num_keys=len(rows),
            columns={
                "key": "key",
                "image": "image" if self.catalog else None,
                "text": None,
                "version": None,
                "carry": None,
            },
            files={},
        )
        snapshot = dataclasses.replace(snapshot, catalog=catalog)
        self.searchers[number] = WordSearcher(rows=rows, snapshot=snapshot)
        commit(self.store, snapshot)
        return number

    def open(self, config: ServiceConfig) -> Opened:
        number = max(self.searchers)
        self.num_opened += 1
        if number in self.errors:
            raise self.errors[number]
        searcher: Any = self.searchers[number]
        found = {name: dataclasses.replace(searcher, modality=name) for name in self.among}
        return Opened(snapshot=searcher.snapshot, searchers={**found, self.among[0]: searcher})

    def config(self, **options: Any) -> ServiceConfig:
        return ServiceConfig(
            **{
                "store_uri": self.store.uri,
                "engines_uri": "unused",
                "refresh_seconds": 0.05,
                "limits": ServiceLimits(max_seconds=WAIT_SECONDS),
                **options,
            }
        )

    def app(self, **options: Any) -> Any:
        return make_app(self.config(**options), opener=self.open)


@contextmanager
def served(app: Any) -> Iterator[str]:
    """An app behind a real HTTP server in a thread; yields its URL."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="on"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(WAIT_SECONDS)


def snapshot_of(url: str) -> int:
    """Which snapshot a service answers from."""
    return int(httpx.get(f"{url}/ready", timeout=WAIT_SECONDS).json()["snapshot"])
