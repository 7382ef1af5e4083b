"""What Ray does in a run, without Ray: the same functions, one after the other, in this process.

A night takes a fraction of a second this way, and can be killed at what its workers write, too.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import pyarrow as pa
import pytest

from engine.images import ImageLimits
from engine.registry import Registry
from pipelines import planning, schema
from pipelines.catalog import Catalog
from pipelines.decode import decode_batch
from pipelines.encode import EncodeStage
from pipelines.ledger import DueRows
from pipelines.metrics import Metric
from pipelines.progress import StageMeter
from pipelines.reading import CatalogDatasource, RowGroupRows, all_rows
from pipelines.snapshots import EngineRecord, StoredFile
from pipelines.stages import Pass, _pieces
from pipelines.writing import stored_files, write_batch


class UnreadMeter(StageMeter):
    """There is no board."""

    def __init__(self) -> None:
        super().__init__(None, stage="")

    def count(
        self, num_rows: int, num_bytes: int, busy_seconds: float, core_seconds: float = 0.0
    ) -> None:
        pass

    def add(self, metric: Metric, value: float, labels: Mapping[str, str]) -> None:
        pass


def use_stages_here(patch: pytest.MonkeyPatch) -> None:
    """Ray is still asked for the size of its cluster, and builds engines that are not there."""
    patch.setattr("pipelines.rounds.run_stages", run_stages)
    patch.setattr("pipelines.rounds._board", lambda _: None)
    patch.setattr("pipelines.rounds.polled", lambda board, on_progress: nullcontext())
    patch.setattr("pipelines.planning._hash", _hash)


def run_stages(pass_: Pass, *, due: Sequence[DueRows], board: Any) -> Iterator[list[StoredFile]]:
    catalog, meter = pass_.catalog, UnreadMeter()
    read = _read(catalog, list(_pieces(catalog, due)), content=catalog.modalities)
    decoded = decode_batch(
        pa.concat_tables(read),
        modalities=catalog.modalities,
        preprocessing=pass_.manifest.preprocessing,
        limits=pass_.limits,
        carry_columns=catalog.config.carry_columns,
    )
    encoded = _encode_stage(pass_.engine, pass_.registry.uri, pass_.dtype)(decoded)
    for first in range(0, encoded.num_rows, pass_.resources.rows_per_file):
        report = write_batch(
            encoded.slice(first, pass_.resources.rows_per_file),
            store=pass_.store,
            plan_id=pass_.plan_id,
            engine_id=pass_.engine.engine_id,
            embeddings_schema=schema.embeddings_schema(
                key_type=catalog.key_type,
                embedding_dim=pass_.manifest.embedding_dim,
                dtype=pass_.dtype,
                carried=catalog.carried,
            ),
            meter=meter,
        )
        yield stored_files(report)


@functools.cache
def _encode_stage(
    engine: EngineRecord, registry_uri: str, dtype: schema.EmbeddingDtype
) -> EncodeStage:
    """Loading takes longer than a night."""
    return EncodeStage(
        engine=engine,
        registry=Registry(registry_uri),
        backend="onnxruntime",
        decoder="cpu",
        limits=ImageLimits(),
        num_threads=1,
        dtype=dtype,
        meter=UnreadMeter(),
        decode_meter=UnreadMeter(),
    )


def _hash(catalog: Catalog, *, paths: Sequence[str], num_cpus: float) -> Iterator[pa.Table]:
    pieces = list(all_rows(catalog, paths=paths))
    for table in _read(catalog, pieces, content=catalog.modalities):
        yield planning._with_fingerprints(table, modalities=catalog.modalities)


def _read(
    catalog: Catalog, pieces: Sequence[RowGroupRows], *, content: Sequence[schema.Modality]
) -> Iterator[pa.Table]:
    for read in CatalogDatasource(catalog, pieces=pieces, content=content).get_read_tasks(1):
        yield from read()
