"""What a store must hold after nights of any kind: a catalog in memory, and what may come of it.

Knows nothing of plans, ledgers, stored files or Ray.

The model in short. A row that has in the snapshot before what it has now, by the same engine, is
left exactly as it was, bit for bit; but a reject may be healed by what a night that did not end
embedded of the very same catalog. Any other row is tried: it holds what its content gives today.
It may also hold what it was given in a night that did not end (killed, stopped by a guard, rolled
back) of the very same catalog, or, where contents are compared, the embedding of the same content
under another key. Fingerprints and reasons are stated here by other means than the product's.
"""

import os
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from pipelines.schema import MODALITIES, Modality
from pipelines.snapshots import CatalogRecord, EngineRecord
from tests import image_files
from tests.catalogs import scene_rows

Key = str | int
Place = tuple[Modality, Key]

SCENES = scene_rows(10)
DAMAGED = {
    b"": "empty_image",
    b"not an image": "not_an_image",
    image_files.truncated_jpeg(): "truncated_image",
}
MAX_TEXT_CHARS = 200
BAD_TEXTS = {None: "null_text", "": "empty_text", " \n": "empty_text", "far " * 99: "text_too_long"}
PICTURES = [row["image"] for row in SCENES]
CAPTIONS = [row["text"] for row in SCENES]
NUM_PATHS = 3
# Of what a file somewhere else holds: nothing yet, something else, or always the same picture.
ELSEWHERE: tuple[bytes | None, ...] = (None, b"not an image", image_files.png())
FIRST_SECOND = 1_700_000_000


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of the catalog."""

    key: Key | None
    image: bytes | None
    path: str | None
    """Of the image, where the row has no bytes of it."""
    text: str | None
    version: int
    price: float

    def fingerprint(self, modality: Modality, *, by_version: bool) -> bytes | None:
        if by_version:
            return xxhash.xxh3_128_digest(f"{modality}\0{self.key}\0{self.version}".encode())
        if modality == "text":
            return None if self.text is None else xxhash.xxh3_128_digest(self.text.encode())
        if self.image is not None:
            return xxhash.xxh3_128_digest(self.image)
        return None if self.path is None else xxhash.xxh3_128_digest(b"uri\0" + self.path.encode())

    def outcome(self, modality: Modality) -> "Outcome":
        """What it gives if it is tried now."""
        content: bytes | str | None = self.text
        if modality == "text":
            reason = BAD_TEXTS.get(self.text)
        else:
            content, reason = self.image, None
            if content is None and self.path is None:
                reason = "null_image"
            elif content is None:
                there = Path(str(self.path))
                content = there.read_bytes() if there.exists() else None
                reason = "fetch_failed" if content is None else None
            reason = reason or DAMAGED.get(content or b"")
        return Outcome(reason=reason, content=None if reason else content, price=self.price)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a row, or may come of it."""

    reason: str | None
    """Of a reject."""
    content: bytes | str | None
    """Of an embedding."""
    price: float
    """The carried column that day."""


@dataclass(frozen=True, kw_only=True)
class Stored:
    """What a snapshot has of one key and modality."""

    fingerprint: bytes | None
    reason: str | None
    vector: bytes | None
    price: float | None
    engine_id: str | None
    """None of a reject."""


@dataclass(frozen=True, kw_only=True)
class State:
    """All that a snapshot says of its rows, and what it was made from."""

    rows: Mapping[Place, Stored]
    whole_rows: frozenset[tuple[str, Key | None, str, int]]
    """Rejects of whole rows: reason, key, file and row."""
    plan: "Plan"
    engine: EngineRecord
    """As it is on record, like the catalog."""
    catalog: CatalogRecord


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a night is of: the very files, and what is done with them."""

    files: tuple[tuple[str, int, int], ...]
    """Names, sizes and times."""
    engine_id: str
    by_version: bool


@dataclass(kw_only=True)
class CatalogInMemory:
    """A catalog on disk, changed at random; only files that change are written again."""

    folder: Path
    integer_keys: bool
    files: dict[str, list[Row]] = field(default_factory=dict)
    _written: dict[str, list[Row]] = field(default_factory=dict)
    _num_writes: int = 0
    _is_anew: bool = False

    @property
    def rows(self) -> list[Row]:
        """In the order that decides which of two rows with one key counts."""
        return [row for name in sorted(self.files) for row in self.files[name]]

    def items(self) -> dict[Key, Row]:
        """The first row of each key."""
        found: dict[Key, Row] = {}
        for row in self.rows:
            if row.key is not None:
                found.setdefault(row.key, row)
        return found

    def whole_row_rejects(self) -> frozenset[tuple[str, Key | None, str, int]]:
        found, seen = set(), set()
        for name in sorted(self.files):
            for number, row in enumerate(self.files[name]):
                if row.key is None or row.key in seen:
                    reason = "null_key" if row.key is None else "duplicate_key"
                    found.add((reason, row.key, str(self.catalog_dir / name), number))
                seen.add(row.key)
        return frozenset(found)

    @property
    def catalog_dir(self) -> Path:
        return self.folder / "catalog"

    def identity(self) -> tuple[tuple[str, int, int], ...]:
        stats = [(path.name, path.stat()) for path in sorted(self.catalog_dir.iterdir())]
        return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)

    def write(self) -> None:
        """Files that differ from what is there; each has a time of its own."""
        self.catalog_dir.mkdir(exist_ok=True)
        key_type = pa.int64() if self.integer_keys else pa.string()
        image_type = pa.struct({"bytes": pa.binary(), "path": pa.string()})
        columns = {"key": key_type, "image": image_type, "text": pa.string()}
        schema = pa.schema({**columns, "version": pa.int64(), "price": pa.float64()})
        for stale in set(self._written) - set(self.files):
            (self.catalog_dir / stale).unlink()
        for name, rows in self.files.items():
            if self._is_anew or self._written.get(name) != rows:
                table = pa.Table.from_pylist(
                    [
                        {
                            "key": row.key,
                            "image": None
                            if row.image is None and row.path is None
                            else {"bytes": row.image, "path": row.path},
                            "text": row.text,
                            "version": row.version,
                            "price": row.price,
                        }
                        for row in rows
                    ],
                    schema=schema,
                )
                pq.write_table(table, self.catalog_dir / name, row_group_size=8)
                self._num_writes += 1
                second = FIRST_SECOND + self._num_writes
                os.utime(self.catalog_dir / name, (second, second))
        self._written = {name: list(rows) for name, rows in self.files.items()}
        self._is_anew = False

    def delivery(self) -> dict[str, tuple[bytes, int, list[Row]]]:
        """All of it, to be delivered again."""
        paths = {name: self.catalog_dir / name for name in self.files}
        return {
            name: (path.read_bytes(), path.stat().st_mtime_ns, list(self.files[name]))
            for name, path in paths.items()
        }

    def deliver(self, delivery: Mapping[str, tuple[bytes, int, list[Row]]]) -> None:
        """The very files of an earlier day, with their times."""
        for path in self.catalog_dir.iterdir():
            path.unlink()
        for name, (content, time, _) in delivery.items():
            (self.catalog_dir / name).write_bytes(content)
            os.utime(self.catalog_dir / name, ns=(time, time))
        self.files = {name: list(rows) for name, (_, _, rows) in delivery.items()}
        self._written = {name: list(rows) for name, rows in self.files.items()}

    # Changes, by name; `draw` is the only source of chance.

    def change(self, what: str, draw: random.Random) -> None:
        getattr(self, f"_{what}")(draw)

    def key(self, number: int) -> Key:
        return 2**40 + number if self.integer_keys else f"k{number}"

    def _new_row(self, key: Key | None, draw: random.Random) -> Row:
        row = Row(key=key, image=None, path=None, text=None, version=0, price=float(draw.random()))
        return _with_text(_with_image(row, self.folder, draw), draw)

    def _add(self, draw: random.Random, *, num_rows: int = 4) -> None:
        used = {row.key for row in self.rows}
        free = [key for key in map(self.key, range(60)) if key not in used]
        for key in draw.sample(free, min(num_rows, len(free))):
            self._file(draw).append(self._new_row(key, draw))

    def _fill(self, draw: random.Random) -> None:
        self._add(draw, num_rows=28)

    def _image(self, draw: random.Random) -> None:
        self._map(draw, 3, lambda row: _changed(_with_image(row, self.folder, draw), draw))

    def _text(self, draw: random.Random) -> None:
        self._map(draw, 3, lambda row: _changed(_with_text(row, draw), draw))

    def _damage(self, draw: random.Random) -> None:
        image, text = draw.choice(list(DAMAGED)), draw.choice(list(BAD_TEXTS))
        self._map(draw, 2, lambda row: _changed(replace(row, image=image, path=None), draw))
        self._map(draw, 2, lambda row: _changed(replace(row, text=text), draw))

    def _spoil(self, draw: random.Random) -> None:
        self._map(draw, 24, lambda row: _changed(replace(row, image=b"not an image"), draw))

    def _mend(self, draw: random.Random) -> None:
        for name, rows in self.files.items():
            self.files[name] = [
                _changed(replace(row, image=draw.choice(PICTURES)), draw)
                if row.image in DAMAGED and draw.random() < 0.7
                else row
                for row in rows
            ]

    def _version(self, draw: random.Random) -> None:
        self._map(draw, 3, lambda row: replace(row, version=row.version + 1))

    def _price(self, draw: random.Random) -> None:
        self._map(draw, 4, lambda row: replace(row, price=float(draw.random())))

    def _delete(self, draw: random.Random) -> None:
        for _ in range(3):
            if rows := self._file(draw):
                rows.pop(draw.randrange(len(rows)))

    def _halve(self, draw: random.Random) -> None:
        for name, rows in self.files.items():
            self.files[name] = draw.sample(rows, len(rows) // 4)

    def _wipe(self, draw: random.Random) -> None:
        self.files = {draw.choice(sorted(self.files)): []}

    def _twins(self, draw: random.Random) -> None:
        if rows := self.rows:
            one = draw.choice(rows)
            same = {"image": one.image, "path": one.path, "text": one.text}
            self._map(draw, 3, lambda row: _changed(replace(row, **same), draw))

    def _rekey(self, draw: random.Random) -> None:
        used = {row.key for row in self.rows}
        free = [key for key in map(self.key, range(60)) if key not in used]
        draw.shuffle(free)
        self._map(draw, 3, lambda row: replace(row, key=free.pop()) if free else row)

    def _duplicate(self, draw: random.Random) -> None:
        if rows := self.rows:
            for key in (draw.choice(rows).key, draw.choice(rows).key):
                of = self._file(draw)
                of.insert(draw.randrange(len(of) + 1), self._new_row(key, draw))

    def _uncover(self, draw: random.Random) -> None:
        """Of two rows with one key the first goes: the file of the other stays as it is."""
        seen: dict[Key | None, str] = {}
        for name in sorted(self.files):
            for row in self.files[name]:
                first = seen.setdefault(row.key, name)
                if first != name and draw.random() < 0.5:
                    self.files[first] = [of for of in self.files[first] if of.key != row.key]
                    return

    def _unkeyed(self, draw: random.Random) -> None:
        self._file(draw).append(self._new_row(None, draw))

    def _rename(self, draw: random.Random) -> None:
        name = draw.choice(sorted(self.files))
        free = [new for new in map("{}.parquet".format, "abcdefgh") if new not in self.files]
        if free:
            self.files[draw.choice(free)] = self.files.pop(name)

    def _split(self, draw: random.Random) -> None:
        rows = self.rows
        draw.shuffle(rows)
        num_files = draw.randrange(1, 5)
        names = draw.sample([f"{letter}.parquet" for letter in "abcdefgh"], num_files)
        self.files = {name: rows[number::num_files] for number, name in enumerate(names)}

    def _rewrite(self, draw: random.Random) -> None:
        self._is_anew = True

    def _elsewhere(self, draw: random.Random) -> None:
        path, content = self.folder / f"{draw.randrange(NUM_PATHS)}.png", draw.choice(ELSEWHERE)
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)

    def _file(self, draw: random.Random) -> list[Row]:
        return self.files[draw.choice(sorted(self.files))]

    def _map(self, draw: random.Random, num_rows: int, change: Callable[[Row], Row]) -> None:
        places = [(name, row) for name, rows in self.files.items() for row in range(len(rows))]
        for name, row in draw.sample(places, min(num_rows, len(places))):
            self.files[name][row] = change(self.files[name][row])


ORDINARY_CHANGES = (
    *("add", "image", "text", "damage", "mend", "version", "price", "delete", "twins", "rekey"),
    *("duplicate", "uncover", "unkeyed", "rename", "split", "rewrite", "elsewhere", "elsewhere"),
)
LARGE_CHANGES = ("fill", "spoil", "halve", "wipe")


def _with_image(row: Row, folder: Path, draw: random.Random) -> Row:
    chance = draw.random()
    if chance < 0.15:
        return replace(row, image=None, path=str(folder / f"{draw.randrange(NUM_PATHS)}.png"))
    if chance < 0.2:
        return replace(row, image=None, path=None)
    return replace(row, image=draw.choice(PICTURES), path=None)


def _with_text(row: Row, draw: random.Random) -> Row:
    bad = draw.random() < 0.05
    return replace(row, text=draw.choice(list(BAD_TEXTS) if bad else CAPTIONS))


def _changed(row: Row, draw: random.Random) -> Row:
    """With another version, as one should; now and then somebody forgets."""
    return replace(row, version=row.version + (draw.random() < 0.8))


@dataclass(kw_only=True)
class Model:
    """What each night may leave, given all the nights before."""

    carries: bool
    """Whether the price is carried."""
    tried: set[Plan] = field(default_factory=set)
    """Plans of all nights that began."""
    outcomes: dict[tuple[str, Modality, Key, bytes | None], set[Outcome]] = field(
        default_factory=lambda: defaultdict(set)
    )
    """Engine, modality, key and fingerprint -> what they were given in any night."""
    by_content: dict[tuple[str, Modality, bytes | None], set[Outcome]] = field(
        default_factory=lambda: defaultdict(set)
    )
    """The same, whatever the key."""

    def begin(
        self, plan: Plan, items: Mapping[Key, Row], *, parent: State | None, retried: Iterable[str]
    ) -> dict[Place, Stored | set[Outcome]]:
        """What a night that begins now may leave: what a row has, exactly, or one of several."""
        retried = set(retried)
        same_engine = parent is not None and parent.plan.engine_id == plan.engine_id
        before: Mapping[Place, Stored] = parent.rows if parent and same_engine else {}
        shares = not (plan.by_version or self.carries)
        expected: dict[Place, Stored | set[Outcome]] = {}
        for key, row in items.items():
            for modality in MODALITIES:
                fingerprint = row.fingerprint(modality, by_version=plan.by_version)
                stored = before.get((modality, key))
                now = row.outcome(modality)
                earlier = self.outcomes[plan.engine_id, modality, key, fingerprint]
                same = self.by_content[plan.engine_id, modality, fingerprint]
                options = {now}
                if stored and stored.fingerprint == fingerprint:
                    if stored.reason not in retried:
                        healed = {outcome for outcome in earlier if not outcome.reason}
                        if stored.reason and healed and plan in self.tried:
                            rejected = Outcome(reason=stored.reason, content=None, price=row.price)
                            expected[modality, key] = {rejected, *healed}
                        else:
                            expected[modality, key] = stored
                        continue
                    options |= {outcome for outcome in earlier if not outcome.reason}
                elif plan in self.tried:
                    options |= earlier
                if shares and fingerprint is not None:
                    options |= {outcome for outcome in same if not outcome.reason}
                expected[modality, key] = options
                earlier.add(now)
                same.add(now)
        self.tried.add(plan)
        return expected


def may_be_reject(expected: Stored | set[Outcome]) -> tuple[bool, bool]:
    """Whether it can only be a reject, and whether it can be one."""
    if isinstance(expected, Stored):
        return bool(expected.reason), bool(expected.reason)
    reasons = [outcome.reason for outcome in expected]
    return all(reasons), any(reasons)
