"""`clipmill index`: builds the FAISS index of a snapshot, the current one if none is named.

Knows nothing of how it is done.
"""

import sys
from collections.abc import Sequence

from jobs.command import CommandParser, print_result, run
from pipelines.indexing import IndexConfig, build_index


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = CommandParser("index", description="Build the index of a snapshot.")
    parser.add_argument("--store", required=True, metavar="URI", help="a store with a snapshot")
    parser.add_argument(
        "--snapshot", type=int, metavar="N", help="its number; the current one if left out"
    )
    parser.add_argument(
        "--max-memory-bytes", type=int, help="for vectors; half of this machine's if left out"
    )
    options = parser.parse_options(argv)
    manifests = build_index(
        IndexConfig(
            store_uri=options.store,
            snapshot=options.snapshot,
            max_memory_bytes=options.max_memory_bytes,
        )
    )
    text = "\n".join(
        f"{manifest.modality}: {manifest.num_rows:,} x {manifest.embedding_dim}, "
        f"{manifest.factory}, index {manifest.index_id}"
        for manifest in manifests
    )
    print_result(manifests, as_json=options.json, text=text)
    return 0


if __name__ == "__main__":
    run(main, sys.argv[1:])
