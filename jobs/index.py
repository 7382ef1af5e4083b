"""`clipmill index`: builds the FAISS index of a snapshot, the current one if none is named.

Knows nothing of how it is done.
"""

import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from pathlib import Path

from engine.registry import default_engines_uri
from jobs.cluster import ray_cluster
from jobs.command import CommandParser, print_result, run
from jobs.index_options import add_index_options, index_options_from
from pipelines.indexes.manifest import IndexManifest
from pipelines.indexes.options import DEFAULT_MIN_RECALL
from pipelines.indexing import IndexConfig, build_index


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = CommandParser("index", description="Build the index of a snapshot.")
    parser.add_argument("--store", required=True, metavar="URI", help="a store with a snapshot")
    parser.add_argument(
        "--snapshot", type=int, metavar="N", help="its number; the current one if left out"
    )
    add_index_options(parser)
    parser.add_argument(
        "--min-recall",
        type=float,
        default=DEFAULT_MIN_RECALL,
        metavar="SHARE",
        help="recall@10 of each kind of queries; below it the index is not promoted",
    )
    parser.add_argument("--engines", default=default_engines_uri(), metavar="URI")
    parser.add_argument(
        "--address",
        metavar="RAY",
        help="a Ray cluster whose nodes share the work; this process alone if left out",
    )
    parser.add_argument("--page", metavar="FILE", help="write plots there, as one HTML page")
    options = parser.parse_options(argv)
    config = IndexConfig(
        store_uri=options.store,
        snapshot=options.snapshot,
        options=index_options_from(options, min_recall=options.min_recall),
    )
    # Ray prints of its own, on stdout, where only the result belongs.
    with (
        redirect_stdout(sys.stderr),
        ray_cluster(options.address) if options.address else nullcontext(),
    ):
        manifests = build_index(config)
    text = "\n".join(index_text(manifest) for manifest in manifests)
    if options.page:
        # Not imported before: matplotlib takes a second.
        from pipelines.recall_page import render_recall_page

        Path(options.page).write_text(render_recall_page(manifests), encoding="utf-8")
        text += f"\nplots: {options.page}"
    print_result(manifests, as_json=options.json, text=text)
    return 0


def index_text(manifest: IndexManifest) -> str:
    """An index in a few lines: what it is, why, and what it finds."""
    lines = [
        f"{manifest.modality}: {manifest.num_rows:,} x {manifest.embedding_dim}, "
        f"{manifest.factory}, index {manifest.index_id}",
        f"  {manifest.reason}",
    ]
    if manifest.measured:
        lines.append("  queries  setting   recall@1      @10     @100   ms a search")
    for entry in manifest.measured:
        mark = "  <- searches" if entry.setting == manifest.setting else ""
        recalls = "".join(f"{entry.recall[str(k)]:9.3f}" for k in (1, 10, 100))
        lines.append(
            f"  {entry.kind:7}{entry.setting:9}  {recalls}{entry.search_seconds * 1e3:14.2f}{mark}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    run(main, sys.argv[1:])
