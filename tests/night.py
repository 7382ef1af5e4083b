"""A catalog, its store, and the command that brings the one up to the other, for tests."""

import dataclasses
from pathlib import Path
from typing import Any

from jobs import nightly
from pipelines.indexes.queries import Part, Query
from pipelines.search import Searcher
from pipelines.snapshots import snapshot_numbers
from pipelines.store import Store
from tests.catalogs import scene_rows
from tests.commands import Done, command

QUERIES = ["a small red circle", "three yellow triangles on a white background"]


@dataclasses.dataclass(frozen=True)
class Night:
    """A catalog, its store, and the command that brings the one up to the other."""

    catalog_dir: Path
    store_dir: Path
    checkpoint_dir: Path
    engines_dir: Path

    def run(self, *options: object, catalog_dir: Path | None = None) -> Done:
        return command(nightly.main, self.words(*options, catalog_dir=catalog_dir))

    def words(self, *options: object, catalog_dir: Path | None = None) -> list[str]:
        words = ["--catalog", catalog_dir or self.catalog_dir, "--store", self.store_dir]
        words += ["--engines", self.engines_dir]
        if not {"--checkpoint", "--engine"} & set(options):
            words += ["--checkpoint", self.checkpoint_dir]
        return [str(word) for word in (*words, *options)]

    def done(self, *options: object, **where: Path) -> Any:
        """Run it, with success; returns the JSON."""
        done = self.run("--json", *options, **where)
        assert done.code == 0, done.err
        return done.json

    def answers(self) -> list[list[tuple[str | int, float]]]:
        searcher = Searcher(str(self.store_dir), engines_uri=str(self.engines_dir), modality="text")
        queries = [Query(parts=(Part(text=text),)) for text in QUERIES]
        return [
            [(hit.key, hit.score) for hit in answer.hits]
            for answer in searcher.search(queries, num_hits=5)
        ]

    def files(self) -> dict[str, tuple[bytes, int]]:
        """All of the store: path -> content and time."""
        return {
            str(path.relative_to(self.store_dir)): (path.read_bytes(), path.stat().st_mtime_ns)
            for path in self.store_dir.rglob("*")
            if path.is_file()
        }


def text_rows(num_rows: int) -> list[dict[str, Any]]:
    return [{"key": row["key"], "text": row["text"]} for row in scene_rows(num_rows)]


def due(plan: dict[str, Any], modality: str = "text") -> int:
    """Of a plan in JSON: keys that are to be embedded or copied."""
    keys = plan["plan"][modality]
    return sum(keys[f"num_{what}"] for what in ("new", "changed", "retried", "moved"))


def current(night: Night) -> tuple[list[int], bytes]:
    """What a reader goes by: numbers of the snapshots, and the manifest of the last."""
    store = Store(str(night.store_dir))
    numbers = snapshot_numbers(store)
    return numbers, store.read(f"snapshots/{numbers[-1]:08d}.json")
