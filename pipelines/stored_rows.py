"""Reads columns of stored files, several files at once.

Knows nothing of what the rows are for.
"""

from collections.abc import Iterable, Iterator, Sequence

import pyarrow as pa

from pipelines.arrow_files import read_parquet
from pipelines.bounded_map import bounded_map
from pipelines.snapshots import StoredFile
from pipelines.store import Store

# A file of some thousand rows is small without its embeddings; the wait is the object store's.
READ_THREADS = 8


def read_stored(
    store: Store, files: Iterable[StoredFile], *, columns: Sequence[str]
) -> Iterator[tuple[StoredFile, pa.Table]]:
    """Each file with some columns of all its rows, in the order of the files.

    Args:
        store: Where they lie.
        files: All with these columns.
        columns: Not the embeddings: `READ_THREADS` files are held at once.

    Raises:
        StoreError: A file cannot be read.
    """

    def read(file: StoredFile) -> tuple[StoredFile, pa.Table]:
        with store.open(file.path) as opened:
            return file, read_parquet(opened, columns=list(columns))

    return bounded_map(read, files, num_threads=READ_THREADS)
