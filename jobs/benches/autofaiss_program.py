"""Builds an index of vectors with autofaiss, and says what it finds of what an exact search finds.

Knows nothing of this project: a Python that has autofaiss runs it, `python FILE FOLDER BYTES`. The
folder holds `vectors/*.npy` float32 [N, D] in the order of their ids, and `queries.npz` as an index
of Clipmill has it; BYTES is what a search may want in memory. Prints one JSON object.
"""

import json
import logging
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import autofaiss
import faiss
import numpy as np
from numpy.typing import NDArray

K = 10
NUM_TIMED = 64
# What a search may take, which autofaiss chooses its parameters for.
WANTED_MS = (1, 2, 3, 5, 10)


def main(folder: Path, num_bytes: int) -> None:
    """Build, then ask as hard as each time allows, on one thread."""
    started = time.perf_counter()
    machine_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    index, report = autofaiss.build_index(
        str(folder / "vectors"),
        save_on_disk=False,
        max_index_memory_usage=f"{num_bytes}B",
        current_memory_available=f"{machine_bytes // 2}B",
        metric_type="ip",
        nb_cores=len(os.sched_getaffinity(0)),
        # It says on standard error what it does, which can take hours.
        verbose=logging.INFO,
    )
    seconds = time.perf_counter() - started
    faiss.omp_set_num_threads(1)
    queries = np.load(folder / "queries.npz")
    measured = []
    for wanted_ms in WANTED_MS:
        autofaiss.tune_index(
            index,
            report["index_key"],
            max_index_query_time_ms=wanted_ms,
            save_on_disk=False,
            verbose=logging.WARNING,
        )
        for number, kind in enumerate(queries["kinds"]):
            asked = np.flatnonzero(queries["kind_of"] == number)
            measured.append(
                {"kind": str(kind), "setting": wanted_ms, **_asked(index, queries, asked)}
            )
    print(json.dumps({"factory": report["index_key"], "seconds": seconds, "measured": measured}))


def _asked(index: Any, queries: Any, asked: NDArray[np.int64]) -> dict[str, float]:
    vectors, own_ids = queries["vectors"][asked], queries["own_ids"][asked]
    _, found = index.search(vectors, K + 1)
    recalls = []
    for row, ids in enumerate(found):
        others = ids[(ids != own_ids[row]) & (ids >= 0)][:K]
        recalls.append(len(np.intersect1d(others, queries["ids"][asked[row], :K])) / K)
    seconds = []
    for vector in vectors[:NUM_TIMED]:
        started = time.perf_counter()
        index.search(vector[None], K)
        seconds.append(time.perf_counter() - started)
    return {"recall": statistics.fmean(recalls), "search_seconds": statistics.median(seconds)}


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
