"""Opens an index: checks its files, maps them into memory, and searches it.

Knows nothing of how it was built, of queries but their vectors, or of conditions but the bitmap
of the ids that they allow.
"""

import os
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import xxhash
from numpy.typing import NDArray

from pipelines.errors import IndexMissingError, StoreError
from pipelines.indexes.bitmaps import Bitmap, bitmap_of, is_set, num_in
from pipelines.indexes.frame import Frame, identity
from pipelines.indexes.index_files import IndexFiles, remove_stale_copies
from pipelines.indexes.lists import Lists
from pipelines.indexes.manifest import FileRecord, IndexManifest, find_index
from pipelines.indexes.rows import RowTable
from pipelines.indexes.shards import FRAME_FILE, TRAINED_FILE
from pipelines.indexes.vector_file import VectorFile
from pipelines.schema import Modality
from pipelines.snapshots import Snapshot
from pipelines.store import Store

LISTS_FILE = "lists.ivf"
PLACES_FILE, VECTORS_FILE, TRUTH_FILE = "places.npy", "vectors.npy", "queries.npz"
# Of what is read at once to check a file.
_READ_BYTES = 2**24
# Candidates for each answer, where answers are re-ranked. Codes of 1 bit have 91 to 97 % of the ten
# nearest among the first 100, of 2 bits 98 % (200,000 x 512).
CANDIDATES = {"RaBitQ,": 30, "PQ": 30, "RaBitQ2": 10}
_FEWEST_CANDIDATES = 5

Vectors = NDArray[np.float32]
Ids = NDArray[np.int64]


class OpenIndex:
    """An index, ready to be searched; by several threads at once, if need be."""

    def __init__(self, manifest: IndexManifest, directory: Path) -> None:
        """Map the files in a folder.

        Raises:
            StoreError: One is missing or damaged.
        """
        self.manifest = manifest
        self.directory = directory
        self.setting = manifest.setting
        """Of searches; larger is slower, and finds more."""
        try:
            self.rows = RowTable(directory)
            self._load()
        except (RuntimeError, KeyError, OSError, ValueError) as error:
            raise _damaged(directory, error) from error
        if not self.rows.num_rows == self._num_vectors() == manifest.num_rows:
            raise _damaged(
                directory,
                f"{self._num_vectors()} vectors, {self.rows.num_rows} keys, and "
                f"{manifest.num_rows} rows in its manifest",
            )

    def search(
        self, vectors: Vectors, *, num_hits: int, allowed: Bitmap | None = None
    ) -> tuple[Vectors, Ids]:
        """The nearest rows to each vector, best first.

        Args:
            vectors: float32 [N, D], unit norm.
            num_hits: K; at least 1.
            allowed: The ids that may be answers, a bitmap; None: all. As many are found as are
                allowed, up to K.

        Returns:
            Cosines float32 [N, K] and ids int64 [N, K], -1 for none.
        """
        num_found = min(num_hits, self.manifest.num_rows)
        if allowed is not None:
            num_found = min(num_found, num_in(allowed))
        scores = np.full((len(vectors), num_hits), -np.inf, dtype=np.float32)
        ids = np.full((len(vectors), num_hits), -1, dtype=np.int64)
        if num_found and len(vectors):
            found = self._search(np.ascontiguousarray(vectors), num_found, allowed)
            scores[:, :num_found], ids[:, :num_found] = found
        return scores, ids

    def vector_of(self, row_id: int) -> Vectors:
        """The vector float32 [D] of a row: as it was, or unit norm to the precision of codes."""
        if self.manifest.kind == "exact":
            return np.asarray(self._index.reconstruct(row_id), dtype=np.float32)
        if self._vectors is not None:
            vector = self._vectors.rows(np.array([row_id]))[0]
        elif self.manifest.kind == "hnsw":
            vector = self._index.reconstruct(int(np.flatnonzero(self._places == row_id)[0]))
        else:
            number, offset = divmod(int(self._places[row_id]), 2**32)
            code = np.empty(self.manifest.embedding_dim, dtype=np.float32)
            self._index.reconstruct_from_offset(number, offset, faiss.swig_ptr(code))
            vector = self._frame.row_of(code)
        return np.asarray(vector / max(float(np.linalg.norm(vector)), 1e-12), dtype=np.float32)

    @property
    def frame(self) -> Frame:
        """The coordinates of its vectors."""
        return self._frame

    @property
    def trained(self) -> Any:
        """The FAISS index, for those who add to it."""
        return self._index

    def _load(self) -> None:
        path = str(self.directory / TRAINED_FILE)
        kind = self.manifest.kind
        self._index = faiss.read_index(path, faiss.IO_FLAG_MMAP_IFC if kind == "exact" else 0)
        self._frame = identity(self.manifest.embedding_dim)
        self._places: Any = None
        self._vectors: VectorFile | None = None
        self._alive: Bitmap | None = None
        if kind == "ivf":
            self._frame = Frame.from_bytes((self.directory / FRAME_FILE).read_bytes())
            lists = Lists(self.directory / LISTS_FILE)
            lists.attach(self._index)
            if self.manifest.factory.endswith("Refine(SQfp16)"):
                self._vectors = VectorFile(self.directory / VECTORS_FILE)
            else:
                self._places = np.load(self.directory / PLACES_FILE, mmap_mode="r")
        elif kind == "hnsw":
            self._places = np.load(self.directory / PLACES_FILE)
        elif self.manifest.num_ids > self.manifest.num_rows:
            self._alive = self.rows.alive()
        factory = self.manifest.factory
        self._num_candidates = next(
            (num for name, num in CANDIDATES.items() if name in factory), _FEWEST_CANDIDATES
        )

    def _num_vectors(self) -> int:
        free = (
            self.manifest.num_ids - self.manifest.num_rows if self.manifest.kind == "exact" else 0
        )
        return int(self._index.ntotal) - free

    def _search(
        self, vectors: Vectors, num_hits: int, allowed: Bitmap | None
    ) -> tuple[Vectors, Ids]:
        if self.manifest.kind == "ivf":
            return self._search_lists(vectors, num_hits, allowed)
        if self.manifest.kind == "hnsw":
            return self._search_graph(vectors, num_hits, allowed)
        if allowed is None:
            allowed = self._alive
        selector = None if allowed is None else faiss.IDSelectorBitmap(allowed)
        parameters = None if selector is None else faiss.SearchParameters(sel=selector)
        scores, ids = self._index.search(vectors, num_hits, params=parameters)
        return scores, ids

    def _search_graph(
        self, vectors: Vectors, num_hits: int, allowed: Bitmap | None
    ) -> tuple[Vectors, Ids]:
        positions = None
        if allowed is not None:
            positions = bitmap_of(
                np.flatnonzero(is_set(allowed, self._places)), num_ids=len(self._places)
            )
        selector = None if positions is None else faiss.IDSelectorBitmap(positions)
        length = max(self.setting, num_hits)
        parameters = faiss.SearchParametersHNSW(efSearch=length, sel=selector)
        scores, found = self._index.search(vectors, num_hits, params=parameters)
        few = np.flatnonzero((found < 0).any(axis=1))
        if len(few):  # a graph finds its way through rows that are not allowed, or does not
            storage = faiss.downcast_index(self._index.storage)
            scan = faiss.SearchParameters(sel=selector) if selector is not None else None
            scores[few], found[few] = storage.search(vectors[few], num_hits, params=scan)
        return scores, np.where(found < 0, -1, self._places[found])

    def _search_lists(
        self, vectors: Vectors, num_hits: int, allowed: Bitmap | None
    ) -> tuple[Vectors, Ids]:
        num_lists = self._index.nlist
        nprobe = max(self.setting, 1)
        num_most = self.manifest.num_rows
        if allowed is not None:
            # As many rows that are allowed are looked at as there would be without a condition.
            num_most = num_in(allowed)
            nprobe = -(-nprobe * self.manifest.num_rows // num_most)
        nprobe = num_lists if 2 * nprobe > num_lists else nprobe
        selector = None if allowed is None else faiss.IDSelectorBitmap(allowed)
        num_wanted = num_hits
        if self._vectors is not None:
            num_wanted = min(num_hits * self._num_candidates, num_most)
        queries = self._frame.of_queries(vectors)
        ask = partial(self._ask_lists, num_hits=num_wanted, selector=selector)
        products, ids = ask(queries, nprobe=nprobe)
        few = np.flatnonzero((ids >= 0).sum(axis=1) < num_hits)
        while len(few) and nprobe < num_lists:
            nprobe = min(4 * nprobe, num_lists)
            products[few], ids[few] = ask(queries[few], nprobe=nprobe)
            few = few[(ids[few] >= 0).sum(axis=1) < num_hits]
        if self._vectors is not None:
            return _reranked(vectors, ids, kept=self._vectors, num_hits=num_hits)
        scores = np.where(ids < 0, -np.inf, self._frame.cosines(products, vectors))
        return scores.astype(np.float32), ids

    def _ask_lists(
        self, queries: Vectors, *, num_hits: int, selector: Any, nprobe: int
    ) -> tuple[Vectors, Ids]:
        parameters = faiss.SearchParametersIVF(nprobe=nprobe, sel=selector)
        if "RaBitQ" in self.manifest.factory:
            parameters = faiss.IVFRaBitQSearchParameters(nprobe=nprobe, sel=selector)
        products, ids = self._index.search(queries, num_hits, params=parameters)
        return products, ids


def open_index(store: Store, snapshot: Snapshot, *, modality: Modality) -> OpenIndex:
    """Open the index of a snapshot's modality, in a local copy if the store is not on a disk.

    Raises:
        IndexMissingError: It is not built.
        StoreError: A file is damaged or cannot be read.
    """
    manifest = find_index(store, snapshot, modality=modality)
    if manifest is None:
        raise IndexMissingError(
            f"store {store.uri}: no index of {modality} embeddings of snapshot "
            f"{snapshot.number}; run `clipmill index --store {store.uri}`"
        )
    return open_build(store, manifest)


def open_build(store: Store, manifest: IndexManifest) -> OpenIndex:
    """Open an index by its manifest; StoreError if a file is damaged or cannot be read."""
    files = IndexFiles(store, manifest.folder, cache_dir=cache_dir(store, manifest))
    for name, record in manifest.files.items():
        if _is_whole(files.local(name), record):
            continue
        # A copy may be of an earlier build.
        files.forget(name)
        if store.is_local or not _is_whole(files.local(name), record):
            raise _damaged(store.full_path(manifest.folder), f"{name} is not what was written")
    if not store.is_local:
        remove_stale_copies(cache_root(store), opened=files.directory)
    return OpenIndex(manifest, files.directory)


def cache_dir(store: Store, manifest: IndexManifest) -> Path:
    """Where copies of an index go: `$XDG_CACHE_HOME/clipmill/indexes`, or in `~/.cache`."""
    return cache_root(store) / manifest.index_id / manifest.build_id


def cache_root(store: Store) -> Path:
    """Where copies of the indexes of a store go."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "clipmill" / "indexes" / xxhash.xxh3_64_hexdigest(store.uri.encode())


def _reranked(
    vectors: Vectors, ids: Ids, *, kept: VectorFile, num_hits: int
) -> tuple[Vectors, Ids]:
    """The best of the candidates [N, C], by the vectors that are kept."""
    scores = np.full(ids.shape, -np.inf, dtype=np.float32)
    for query, row_ids in enumerate(ids):
        found = row_ids >= 0
        scores[query, found] = kept.rows(row_ids[found]) @ vectors[query]
    order = np.lexsort((ids, -scores), axis=1)[:, :num_hits]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(ids, order, axis=1)


def _is_whole(path: Path, record: FileRecord) -> bool:
    try:
        return path.stat().st_size == record.num_bytes and file_digest(path) == record.xxh3_128
    except OSError:
        return False


def file_digest(path: Path) -> str:
    """XXH3-128 of a file's content; reading it also brings it into the machine's page cache."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _damaged(folder: Path | str, why: object) -> StoreError:
    reason = (str(why).splitlines() or [""])[0]
    return StoreError(
        f"index {folder} is damaged ({reason}); remove the folder {Path(folder).parent} and run "
        "`clipmill index` again"
    )
