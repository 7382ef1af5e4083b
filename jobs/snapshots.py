"""`clipmill snapshots list|show|diff|files|rollback|vacuum`: the states of a store.

Knows nothing of how they are made.
"""

import shlex
import sys
from collections.abc import Sequence
from typing import get_args

from engine.redaction import public_uri
from jobs.command import Actions, CommandParser, dispatch, print_result, run
from pipelines.changes import find_changes
from pipelines.counts import plan_line
from pipelines.errors import StoreError
from pipelines.indexes.manifest import check_rollback
from pipelines.lineage import Lineage, measurement_line
from pipelines.schema import MODALITIES
from pipelines.snapshots import (
    Kind,
    Snapshot,
    numbers_in_words,
    read_log,
    read_snapshot,
    rollback,
)
from pipelines.store import Store
from pipelines.vacuum import Retention, find_garbage, vacuum


def main(argv: Sequence[str] | None = None) -> int:
    """Run the action that the first word names; returns its exit code."""
    return dispatch("snapshots", ACTIONS, argv)


def _list(argv: Sequence[str]) -> int:
    parser = _parser("list", "All snapshots of a store, the current one last.")
    options = parser.parse_options(argv)
    store = Store(options.store)
    log = list(read_log(store))
    records = [
        {"number": number, "error": str(found)} if isinstance(found, StoreError) else _record(found)
        for number, found in log
    ]
    lines = [
        f"{number:>6}  {found}" if isinstance(found, StoreError) else _line(found)
        for number, found in log
    ]
    text = "\n".join(lines) or f"store {public_uri(store.uri)} has no snapshot"
    print_result(records, as_json=options.json, text=text)
    return 0


def _show(argv: Sequence[str]) -> int:
    parser = _parser("show", "One snapshot, with its files as JSON.")
    parser.add_argument("number", type=int, nargs="?", help="the current one if left out")
    options = parser.parse_options(argv)
    store = Store(options.store)
    snapshot = read_snapshot(store, options.number)
    columns = [f"{role} {name}" for role, name in snapshot.catalog.columns.items() if name]
    lines = [
        _line(snapshot),
        f"  run      {snapshot.run_id}, after snapshot {snapshot.parent or 'none'}",
        f"  engine   {snapshot.engine.engine_id} of {snapshot.engine.checkpoint}, by "
        f"{snapshot.backend}, images decoded by {snapshot.decoder}",
        f"  catalog  {snapshot.catalog.uri}: {snapshot.catalog.num_rows:,} rows, "
        f"{snapshot.catalog.num_keys:,} keys in {len(snapshot.catalog.files):,} files; "
        f"{', '.join(columns)}",
        f"  rows     {snapshot.embedding_dim} x {snapshot.embedding_dtype}, keys "
        f"{snapshot.key_type}, in {len(snapshot.files):,} files of "
        f"{sum(file.num_bytes for file in snapshot.files) / 2**20:,.1f} MiB",
    ]
    lines += [] if snapshot.lineage is None else _lineage_lines(snapshot.lineage)
    print_result(snapshot, as_json=options.json, text="\n".join(lines))
    return 0


def _diff(argv: Sequence[str]) -> int:
    parser = _parser("diff", "What changed from one snapshot to another, in keys.")
    parser.add_argument("before", type=int, help="a snapshot's number")
    parser.add_argument("after", type=int, nargs="?", help="the current one if left out")
    options = parser.parse_options(argv)
    store = Store(options.store)
    before, after = read_snapshot(store, options.before), read_snapshot(store, options.after)
    changes = find_changes(store, before, after)
    lines = [f"snapshot {before.number} -> {after.number}"]
    if before.engine.engine_id != after.engine.engine_id:
        lines.append(f"  engine {before.engine.engine_id} -> {after.engine.engine_id}")
    lines += [
        f"  {modality:<6} {found.added:,} added, {found.removed:,} removed, {found.changed:,} "
        f"changed, {found.rejected:,} rejected now, {found.healed:,} rejected no more"
        for modality, found in changes.items()
    ]
    print_result(changes, as_json=options.json, text="\n".join(lines))
    return 0


def _rollback(argv: Sequence[str]) -> int:
    parser = _parser("rollback", "Make an earlier snapshot current again, as a new one.")
    parser.add_argument("number", type=int, help="the earlier snapshot's")
    options = parser.parse_options(argv)
    store = Store(options.store)
    check_rollback(store, options.number)
    snapshot = rollback(store, options.number)
    print_result(_record(snapshot), as_json=options.json, text=_line(snapshot))
    return 0


def _vacuum(argv: Sequence[str]) -> int:
    parser = _parser("vacuum", "Remove old snapshots, and what no other one needs.")
    parser.add_argument("--keep", type=int, required=True, metavar="N", help="so many last ones")
    parser.add_argument(
        "--min-age-hours",
        type=float,
        default=Retention(num_snapshots=1).min_age_hours,
        help="what was current or written since stays: longer than any reader or pause of a run",
    )
    parser.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    options = parser.parse_options(argv)
    retention = Retention(num_snapshots=options.keep, min_age_hours=options.min_age_hours)
    act = find_garbage if options.dry_run else vacuum
    found = act(Store(options.store), retention)
    numbers = numbers_in_words(found.snapshots) or "none"
    lines = [f"snapshots {'to be removed' if options.dry_run else 'removed'}: {numbers}"]
    lines += [
        f"  {place:<12}{num_files:>9,} files {found.num_bytes[place] / 2**20:>12,.1f} MiB"
        for place, num_files in found.num_files.items()
    ]
    print_result(found, as_json=options.json, text="\n".join(lines))
    return 0


def _files(argv: Sequence[str]) -> int:
    parser = _parser("files", "The Parquet files of one snapshot: a URI on each line.")
    parser.add_argument("number", type=int, nargs="?", help="the current one if left out")
    parser.add_argument("--kind", default="embeddings", choices=get_args(Kind))
    parser.add_argument("--modality", choices=MODALITIES, help="of all rows; all if left out")
    options = parser.parse_options(argv)
    store = Store(options.store)
    snapshot = read_snapshot(store, options.number)
    files = snapshot.files_of(options.kind, modality=options.modality)
    root = public_uri(store.uri).rstrip("/")
    uris = [f"{root}/{file.path}" for file in files]
    if uris or options.json:  # an empty line would be a file to a shell
        print_result(uris, as_json=options.json, text="\n".join(uris))
    return 0


def _parser(action: str, description: str) -> CommandParser:
    parser = CommandParser(f"snapshots {action}", description=description)
    parser.add_argument("--store", required=True, metavar="URI", help="an output folder of embed")
    return parser


def _record(snapshot: Snapshot) -> dict[str, object]:
    return {
        "number": snapshot.number,
        "created_at": snapshot.created_at,
        "restores": snapshot.restores,
        "engine_id": snapshot.engine.engine_id,
        "num_keys": snapshot.catalog.num_keys,
        "num_embeddings": {
            modality: snapshot.num_rows("embeddings", modality=modality)
            for modality in snapshot.modalities
        },
        "num_rejects": snapshot.num_rows("rejects"),
        "num_files": len(snapshot.files),
    }


def _lineage_lines(lineage: Lineage) -> list[str]:
    lines = [f"  plan     {modality}: {plan_line(keys)}" for modality, keys in lineage.plan.items()]
    lines += [f"  code     Clipmill {lineage.code_version}"]
    if lineage.command:
        lines.append(f"  command  {shlex.join(lineage.command)}")
    lines += [
        f"  guard    {measurement_line(measurement)}"
        + (", accepted" if measurement.is_tripped else "")
        for measurement in lineage.measurements
    ]
    return lines


def _line(snapshot: Snapshot) -> str:
    stored = ", ".join(
        f"{snapshot.num_rows('embeddings', modality=modality):,} {modality}"
        for modality in snapshot.modalities
    )
    restores = "" if snapshot.restores is None else f", restores {snapshot.restores}"
    return (
        f"{snapshot.number:>6}  {snapshot.created_at}  {snapshot.engine.engine_id}  "
        f"{snapshot.catalog.num_keys:,} keys: {stored}, {snapshot.num_rows('rejects'):,} rejects"
        f"{restores}"
    )


ACTIONS: Actions = {
    "files": (_files, "the Parquet files of one, for other programs"),
    "list": (_list, "all snapshots, the current one last"),
    "show": (_show, "one of them"),
    "diff": (_diff, "what changed from one to another"),
    "rollback": (_rollback, "make an earlier one current again"),
    "vacuum": (_vacuum, "remove old ones, and what no other needs"),
}


if __name__ == "__main__":
    run(main, sys.argv[1:])
