"""Queries that an index's recall is measured with: rows that are drawn, or texts that were given.

Knows nothing of their answers.
"""

import os

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from engine.backends.onnx_cpu import OnnxCpuEncoder
from engine.registry import Registry, default_engines_uri
from pipelines.engines import ready_engine
from pipelines.fingerprints import plan_id
from pipelines.guarding.stored_samples import draw_sample
from pipelines.indexes.building import Build
from pipelines.indexes.manifest import indexed_files
from pipelines.indexes.options import IndexOptions
from pipelines.indexes.shards import rows_of
from pipelines.indexes.truth import Truth
from pipelines.snapshots import Snapshot

# Queries of each kind that recall is measured with. An exact search finds all, or has a fault that
# a few show.
NUM_QUERIES = 512
NUM_QUERIES_OF_EXACT = 64
_TEXTS_AT_ONCE = 64

Vectors = NDArray[np.float32]
Ids = NDArray[np.int64]


def draw_queries(build: Build) -> Truth:
    """Queries of each kind, not answered yet; those that are drawn are no answers to themselves.

    Args:
        build: Whose rows are written.

    Raises:
        StoreError: A file cannot be read.
    """
    rows, snapshot = rows_of(build.work), build.snapshot
    num_queries = NUM_QUERIES_OF_EXACT if build.recipe.kind == "exact" else NUM_QUERIES
    queries: list[tuple[str, Vectors, Ids]] = []
    for kind in snapshot.modalities:
        if kind == "text" and build.options.query_texts:
            continue
        sample = draw_sample(build.store, indexed_files(snapshot, modality=kind))
        if sample is None:
            continue
        drawn = np.linspace(0, len(sample.keys) - 1, min(num_queries, len(sample.keys))).astype(int)
        ids = np.full(len(drawn), -1, dtype=np.int64)
        if kind == build.modality:
            ids = rows.ids_of(sample.keys.take(pa.array(drawn)))
        queries.append((kind, sample.vectors[drawn], ids))
    if build.options.query_texts:
        own_queries = _own_queries(snapshot, build.options)
        queries.append(("text", own_queries, np.full(len(own_queries), -1, dtype=np.int64)))
    return Truth.unanswered(queries, embedding_dim=build.embedding_dim)


def asked_hash(options: IndexOptions) -> str:
    """A name for the texts that recall is to be measured with; empty if texts are drawn."""
    return plan_id(list(map(repr, options.query_texts))) if options.query_texts else ""


def _own_queries(snapshot: Snapshot, options: IndexOptions) -> Vectors:
    registry = Registry(options.engines_uri or default_engines_uri())
    engine = ready_engine(snapshot.engine, registry=registry)
    encoder = OnnxCpuEncoder(engine.directory, num_threads=len(os.sched_getaffinity(0)))
    texts = options.query_texts
    parts = [
        encoder.encode_texts(texts[first : first + _TEXTS_AT_ONCE])
        for first in range(0, len(texts), _TEXTS_AT_ONCE)
    ]
    return np.concatenate(parts)
