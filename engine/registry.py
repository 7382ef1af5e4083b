"""Engines by content: an engine and its plans are built once, published whole, found by their ids.

Knows nothing of how engines are built or what executes them.

A root on a disk is where engines are used, too. Engines of a root anywhere else are copied to a
folder of the node first, because runtimes load files.

    ENGINES/
      fp8-0011223344556677/     an engine (`engine/publishing/`)
        plans/PLAN/             a plan of it
        gates/00000001/         a report of its gate (`engine/gate_reports.py`)
      promotions/DIGEST/        which engine of a checkpoint is current (`engine/promotion.py`)
      leases/                   off disks: who builds (`engine/publishing/leases.py`)
"""

import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import get_args

from engine.errors import DamagedError, EngineError
from engine.manifest import MANIFEST_FILE, Manifest, Precision, parse_manifest, read_manifest
from engine.publishing.artifacts import Artifact, LocalArtifacts
from engine.publishing.folders import Folder
from engine.publishing.leases import Lease, LeaseQueue, LeaseTiming
from engine.publishing.remote import pull, push, read_record
from engine.redaction import public_uri

PLANS_DIR, PLAN_FILE = "plans", "plan.json"
PROMOTIONS_DIR = "promotions"

# Told what was built (engine, plan), and the seconds that it took.
OnBuilt = Callable[[str, float], None]

_WAY_OUT = "name another with --engines or $CLIPMILL_ENGINES"
_log = logging.getLogger(__name__)
_ENGINE_PREFIXES = tuple(f"{precision}-" for precision in get_args(Precision))
_ID = re.compile(r"[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, kw_only=True, slots=True)
class Engine:
    """A whole engine on this node."""

    directory: Path
    """Where its files lie."""
    manifest: Manifest
    """What it is."""


def default_engines_uri() -> str:
    """`$CLIPMILL_ENGINES`, or a folder in the user's cache."""
    return os.environ.get("CLIPMILL_ENGINES") or str(_cache_dir() / "engines")


def _cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "clipmill"


class Registry:
    """The engines under a URI. Small, and safe to send to workers."""

    def __init__(
        self,
        uri: str,
        *,
        lease_timing: LeaseTiming | None = None,
        on_built: OnBuilt | None = None,
    ) -> None:
        """Find the file system of `uri`; nothing is read or written yet.

        Args:
            uri: A folder, or any fsspec URI.
            lease_timing: How builders on other nodes are waited for.
            on_built: Called where something was built; what is sent to workers can be pickled.

        Raises:
            EngineError: No such kind of file system, or the package that reads it is missing.
        """
        self.uri = uri
        self.root = Folder(
            uri,
            called="engines",
            error=EngineError,
            way_out=f"Check the path, its permissions and the free space, or {_WAY_OUT}",
        )
        self._lease_timing = lease_timing or LeaseTiming()
        self._on_built = on_built

    @property
    def local(self) -> LocalArtifacts:
        """The folder of this node where engines lie: the root itself, or copies of it."""
        if self.root.is_local:
            return LocalArtifacts(
                Path(self.root.full_path("")),
                way_out=f"check the permissions and the free space, or {_WAY_OUT}",
            )
        name = hashlib.sha256(self.uri.rstrip("/").encode()).hexdigest()[:16]
        return LocalArtifacts(
            _cache_dir() / "engines-of" / name,
            way_out="check its permissions and the free space, or name another $XDG_CACHE_HOME",
        )

    def find(self, engine_id: str) -> Engine | None:
        """The engine, its files checked; None if it is not built, or damaged, which is logged.

        Raises:
            EngineError: The root cannot be read, this node's copy cannot be written, or the engine
                is of a newer Clipmill.
        """
        artifact = engine_artifact(engine_id)
        found = self.local.find(artifact)
        if found is None and not self.root.is_local:
            with self.local.lock(artifact):
                found = self.local.find(artifact) or self._fetch_published(artifact)
        return None if found is None else _engine(found)

    def obtain(self, engine_id: str, build: Callable[[Path], object]) -> Engine:
        """Find the engine, or build it; of all who ask at once, on any node, one builds.

        A damaged engine is built anew. So is one whose builder was killed: at once by the next on
        the same node, by other nodes when its lease has run out.

        Args:
            engine_id: Which.
            build: Writes the engine's files into an empty folder, `manifest.json` last.

        Raises:
            EngineError: The root or this node's folder cannot be written, or the engine is of a
                newer Clipmill.
        """
        timed = self._timed(build, what="engine")
        return _engine(self._obtain(engine_artifact(engine_id), timed))

    def obtain_plan(self, engine_id: str, plan_id: str, build: Callable[[Path], object]) -> Path:
        """The folder of a plan, found or built like an engine is.

        Args:
            engine_id: An engine that is built.
            plan_id: Which of its plans.
            build: Writes the plan's files into an empty folder, and last `plan.json` with their
                names and SHA-256 as `files`.

        Raises:
            EngineError: There is no such engine, or as for `obtain`.
        """
        artifact = plan_artifact(engine_id, plan_id)
        path = self.local.directory / engine_id / MANIFEST_FILE
        if not path.exists() and self.find(engine_id) is None:
            raise EngineError(
                f"engines {self.uri}: no whole engine {engine_id} to make a plan of; run "
                "`clipmill engine build`"
            )
        return self._obtain(artifact, self._timed(build, what="plan"))

    def manifest(self, engine_id: str) -> Manifest | None:
        """The manifest on the root, None if there is none or it is damaged, which is logged.

        No other file is looked at.

        Raises:
            EngineError: The root cannot be read, or the engine is of a newer Clipmill.
        """
        record = read_record(self.root, engine_artifact(engine_id))
        if record is None:
            return None
        try:
            return parse_manifest(record, path=self.root.full_path(f"{engine_id}/{MANIFEST_FILE}"))
        except DamagedError as error:
            _log.warning("engine %s is damaged: %s", engine_id, error)
            return None

    def engine_ids(self) -> list[str]:
        """Names of the folders of engines on the root, published or not; EngineError."""
        names = filter(is_engine_id, self.root.names(""))
        return [name for name in names if self.root.names(name)]

    def plan_ids(self, engine_id: str) -> list[str]:
        """Names of the folders of an engine's plans on the root, published or not; EngineError."""
        names = self.root.names(f"{engine_artifact(engine_id).path}/{PLANS_DIR}")
        return [name for name in names if self.root.names(plan_artifact(engine_id, name).path)]

    def _timed(self, build: Callable[[Path], object], *, what: str) -> Callable[[Path], object]:
        def timed(into: Path) -> None:
            started = time.monotonic()
            build(into)
            if self._on_built is not None:
                self._on_built(what, time.monotonic() - started)

        return timed

    def _obtain(self, artifact: Artifact, build: Callable[[Path], object]) -> Path:
        found = self.local.find(artifact)
        if found is not None:
            return found
        with self.local.lock(artifact):
            found = self.local.find(artifact)
            if found is not None:
                return found
            if not self.root.is_local:
                return self._obtain_remote(artifact, build)
            with self.local.building(artifact) as building:
                self.local.fill(building, artifact, write=build)
                return self.local.publish(artifact, building)

    def _obtain_remote(self, artifact: Artifact, build: Callable[[Path], object]) -> Path:
        queue = LeaseQueue(self.root, artifact.path, timing=self._lease_timing)
        lease: Lease | None = None
        damaged: bytes | None = None
        while True:
            with lease or nullcontext():
                record = read_record(self.root, artifact)
                # With the lease in hand look again: it may have been built, or mended, meanwhile.
                if record is not None and (record != damaged or lease is not None):
                    found = self._fetch(artifact, record)
                    if found is not None:
                        return found
                    damaged = record
                if lease is not None:
                    return self._build_remote(artifact, build, damaged=damaged)
            lease = queue.take()
            if lease is None:
                time.sleep(self._lease_timing.beat_seconds)

    def _build_remote(
        self, artifact: Artifact, build: Callable[[Path], object], *, damaged: bytes | None
    ) -> Path:
        with self.local.building(artifact) as building:
            self.local.fill(building, artifact, write=build)
            if push(self.root, artifact, building, damaged=damaged):
                return self.local.publish(artifact, building)
        found = self._fetch_published(artifact)
        if found is None:
            raise DamagedError(
                f"engines {self.uri}: another node published {artifact.path} first, and it is "
                "damaged; run the same command again"
            )
        return found

    def _fetch_published(self, artifact: Artifact) -> Path | None:
        record = read_record(self.root, artifact)
        return None if record is None else self._fetch(artifact, record)

    def _fetch(self, artifact: Artifact, record: bytes) -> Path | None:
        """Copy from the root to this node, under the lock; None if damaged, which is logged."""
        with self.local.building(artifact) as building:
            try:
                self.local.fill(
                    building,
                    artifact,
                    write=lambda into: pull(self.root, artifact, record=record, into=into),
                )
            except DamagedError as error:
                _log.warning("engines %s: damaged and not used: %s", public_uri(self.uri), error)
                return None
            return self.local.publish(artifact, building)


def is_engine_id(name: str) -> bool:
    """Whether a name is one that an engine could have."""
    return name.startswith(_ENGINE_PREFIXES) and _ID.fullmatch(name) is not None


def engine_artifact(engine_id: str) -> Artifact:
    """Where an engine lies; ValueError if that is no engine id."""
    files_in = partial(_manifest_files, engine_id)
    return Artifact(path=_checked(engine_id), record=MANIFEST_FILE, files_in=files_in)


def plan_artifact(engine_id: str, plan_id: str) -> Artifact:
    """Where a plan lies; ValueError if that is no engine id or no plan id."""
    path = f"{_checked(engine_id)}/{PLANS_DIR}/{_checked(plan_id)}"
    return Artifact(path=path, record=PLAN_FILE)


def _checked(name: str) -> str:
    if not _ID.fullmatch(name):
        raise ValueError(f"id {name!r}: expected letters, digits, '.', '_' and '-'")
    return name


def _manifest_files(engine_id: str, content: bytes, path: str) -> Mapping[str, str]:
    manifest = parse_manifest(content, path=path)
    if manifest.engine_id != engine_id:
        raise DamagedError(f"{path}: of another engine, {manifest.engine_id}")
    return manifest.files


def _engine(directory: Path) -> Engine:
    return Engine(directory=directory, manifest=read_manifest(directory))
