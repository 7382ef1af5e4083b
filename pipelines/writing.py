"""The write stage: encoded rows -> Parquet files of embeddings and rejects in the store.

Knows nothing of snapshots: a file that no snapshot lists does not exist for a reader.
"""

import io
import uuid
from pathlib import PurePosixPath
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines import metrics, schema
from pipelines.cluster.worker_logs import redact_worker
from pipelines.progress import StageMeter
from pipelines.resilience.attempts import attempted
from pipelines.schema import MODALITIES, Modality
from pipelines.snapshots import Kind, StoredFile
from pipelines.store import Store

# Where the rows of a file come from: an encoder, or other files of the store.
Origin = Literal["encoded", "stored"]

COMPRESSION = "zstd"
# 32 MiB of embeddings of 512 float32: a reader holds one at a time. Only files of more than
# --rows-per-file's default have several.
ROWS_PER_GROUP = 16_384


def staging_dir(kind: Kind, *, plan_id: str) -> str:
    """Where files of a plan lie: a run that goes on with the same plan finds them there."""
    return f"{kind}/{plan_id}"


def is_encoded(file: StoredFile) -> bool:
    """Whether a file holds what an encoder made, by its name: that is all that a killed run left.

    Files of a Clipmill of before names told count as encoded.
    """
    return not PurePosixPath(file.path).name.startswith(f"{file.modality}-stored-")


def write_table(
    table: pa.Table,
    *,
    kind: Kind,
    modality: Modality | None,
    plan_id: str,
    store: Store,
    origin: Origin = "encoded",
) -> StoredFile:
    """Write one Parquet file under a new name, whole or not at all."""
    buffer = io.BytesIO()
    pq.write_table(
        table,
        buffer,
        compression=COMPRESSION,
        row_group_size=ROWS_PER_GROUP,
        # Floats of an embedding do not repeat; a dictionary of them is only overhead.
        use_dictionary=[name for name in table.column_names if name != schema.EMBEDDING],
    )
    stored = "stored-" if origin == "stored" else ""
    name = f"{modality or 'row'}-{stored}{uuid.uuid4().hex}.parquet"
    path = f"{staging_dir(kind, plan_id=plan_id)}/{name}"
    store.publish(path, buffer.getvalue())
    return StoredFile(
        path=path,
        kind=kind,
        modality=modality,
        num_rows=table.num_rows,
        num_bytes=buffer.tell(),
    )


def write_batch(
    table: pa.Table,
    *,
    store: Store,
    plan_id: str,
    engine_id: str,
    embeddings_schema: pa.Schema,
    meter: StageMeter,
) -> pa.Table:
    """Write a batch of encoded rows, and report one row for each file that was written."""
    redact_worker()
    key_type = embeddings_schema.field(schema.KEY).type
    rejects_schema = schema.rejects_schema(key_type=key_type)
    files = []
    work = f"writing {table.num_rows} rows"
    with attempted(work, meter=meter), meter.batch() as size:
        ids = pa.repeat(engine_id, table.num_rows)
        table = table.append_column(schema.ENGINE_ID, ids)
        for modality in MODALITIES:
            rows = table.filter(pc.equal(table[schema.MODALITY], modality))
            rejected = rows[schema.REASON].is_valid()
            for entry in rows[schema.REASON].drop_null().value_counts().to_pylist():
                labels = {"modality": modality, "reason": entry["values"]}
                meter.add(metrics.REJECTS, entry["counts"], labels)
            for kind, part, columns in (
                ("embeddings", rows.filter(pc.invert(rejected)), embeddings_schema),
                ("rejects", rows.filter(rejected), rejects_schema),
            ):
                if part.num_rows:
                    files.append(
                        write_table(
                            part.select(columns.names).cast(columns),
                            kind=kind,  # type: ignore[arg-type]
                            modality=modality,
                            plan_id=plan_id,
                            store=store,
                        )
                    )
        size(table.num_rows, sum(file.num_bytes for file in files))
    return pa.table(
        {
            schema.PATH: [file.path for file in files],
            schema.KIND: [file.kind for file in files],
            schema.MODALITY: [file.modality for file in files],
            schema.NUM_ROWS: [file.num_rows for file in files],
            schema.NUM_BYTES: [file.num_bytes for file in files],
        },
        schema=_REPORT_SCHEMA,
    )


def stored_files(report: pa.Table) -> list[StoredFile]:
    """The files that a report of `write_batch` names."""
    return [StoredFile(**row) for row in report.to_pylist()]


_REPORT_SCHEMA = pa.schema(
    {
        schema.PATH: pa.string(),
        schema.KIND: pa.string(),
        schema.MODALITY: pa.string(),
        schema.NUM_ROWS: pa.int64(),
        schema.NUM_BYTES: pa.int64(),
    }
)
