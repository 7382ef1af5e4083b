"""Checks that a store can be written as a run does it, and that a catalog and engines can be read.

Knows nothing of what is done with them.
"""

import os
import uuid
from contextlib import suppress
from pathlib import Path
from typing import cast

from engine.backends.choice import Machine, choose_backend
from engine.errors import EngineError
from engine.inventory import list_engines
from engine.manifest import Precision
from engine.registry import Registry
from jobs.checks.check import Check
from pipelines.catalog import CatalogConfig, check_has_rows, open_catalog
from pipelines.errors import CatalogError, StoreError
from pipelines.snapshots import current_snapshot
from pipelines.store import Store

S3_EXTRA = "pip install 'clipmill[s3]'"


def store_check(uri: str) -> Check:
    """List, create a file exclusively, replace one, read it, remove it; read what is current.

    What was not there before is not there after.
    """
    try:
        store = Store(uri)
        absent = _absent_folders(Path(store.full_path(""))) if store.is_local else []
        try:
            found = _tried(store)
        finally:
            for folder in absent:
                with suppress(OSError):  # not there, or somebody fills it
                    os.rmdir(folder)
    except StoreError as error:
        mend = S3_EXTRA if "s3fs" in str(error) else "do what it says, or name another --store"
        return Check(name="store", verdict="wrong", found=str(error), mend=mend, is_needed=True)
    return Check(name="store", verdict="ok", found=found, is_needed=True)


def _tried(store: Store) -> str:
    snapshot = current_snapshot(store)
    store.check_writable()
    probe, content = f".probe-{uuid.uuid4().hex}", b"probe"
    store.publish(probe, content)
    try:
        if store.read(probe) != content:
            raise StoreError(
                f"store {store.uri}: what was written is read back as something else; use a disk, "
                "or an object store without a cache between"
            )
    finally:
        store.remove(probe)
    if store.read_if_there(probe) is not None:
        raise StoreError(
            f"store {store.uri}: what was removed is still read; use a disk, or an object store "
            "without a cache between"
        )
    writes = "lists, creates exclusively, replaces, reads, removes"
    if snapshot is None:
        return f"{writes}; no snapshot yet"
    return (
        f"{writes}; snapshot {snapshot.number} is current, {snapshot.catalog.num_keys:,} keys by "
        f"{snapshot.engine.engine_id}"
    )


def _absent_folders(folder: Path) -> list[Path]:
    """Those of a folder and its parents that are not there, the innermost first."""
    return [parent for parent in (folder, *folder.parents) if not parent.exists()]


def catalog_check(config: CatalogConfig) -> Check:
    """List its files and read their schemas."""
    try:
        catalog = open_catalog(config)
        check_has_rows(catalog)
    except CatalogError as error:
        mend = S3_EXTRA if "s3fs" in str(error) else "do what it says, or name another --catalog"
        return Check(name="catalog", verdict="wrong", found=str(error), mend=mend, is_needed=True)
    columns = {
        f"key {config.key_column}": str(catalog.key_type),
        f"image {catalog.image_column}": catalog.image_column and str(catalog.image_layout),
        f"text {catalog.text_column}": catalog.text_column and "string",
    }
    said = ", ".join(f"{name} ({kind})" for name, kind in columns.items() if kind)
    return Check(
        name="catalog",
        verdict="ok",
        found=f"{catalog.num_rows:,} rows in {len(catalog.files):,} files: {said}",
        is_needed=True,
    )


def engines_check(uri: str, *, machine: Machine | None = None) -> Check:
    """List the engines and read what they are.

    Args:
        uri: Of the engines.
        machine: That should run those that are promoted; None: others do.
    """
    try:
        entries = list_engines(Registry(uri))
    except EngineError as error:
        mend = S3_EXTRA if "s3fs" in str(error) else "do what it says, or name another --engines"
        return Check(name="engines", verdict="wrong", found=str(error), mend=mend, is_needed=True)
    current = [entry.engine_id for entry in entries if entry.is_promoted]
    if not entries:
        found = f"none at {uri} yet: `clipmill embed` builds one in float32"
    else:
        found = f"{len(entries)} at {uri}; promoted: {', '.join(current) or 'none'}"
    faults = {} if machine is None else _faults_of(current, machine)
    if faults:
        # Not needed: which checkpoint is embedded with, nobody said.
        return Check(
            name="engines",
            verdict="wrong",
            found=f"{found}; of these {', '.join(faults)} do not run here",
            mend="; ".join(dict.fromkeys(faults.values())),
        )
    return Check(name="engines", verdict="ok", found=found, is_needed=True)


def _faults_of(engine_ids: list[str], machine: Machine) -> dict[str, str]:
    """Engine -> why it does not run on a machine, with the way out; of those that do not."""
    faults = {}
    for engine_id in engine_ids:
        precision = cast("Precision", engine_id.partition("-")[0])
        try:
            choose_backend("auto", precision=precision, machine=machine)
        except EngineError as error:
            faults[engine_id] = str(error)
    return faults
