"""The stages that may be the end of their workers, and what is done so that a run survives that.

Knows nothing of what the stages do.

Ray starts a worker anew that died, maybe on another node, and gives it again what it was at. Where
that happened twice (`attempts.SUSPECT_ATTEMPTS`), the work is done in a process of its own, which
finds the rows that it dies of; the worker does nothing else meanwhile, so that none but that work
can be what it dies of then. Batches that merely were with the same worker are done so too, and none
of their rows is blamed.

What a row may make such a process take of memory is bound by the machine's, too: it is stopped
before the kernel or Ray end processes, which may be others.

Rows come out in the order in which they came. One that was encoded alone has the same embedding as
beside others but for rounding, as wherever the rows beside it are others.
"""

import logging
import os
import threading
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from ray._common.utils import get_system_memory

from engine.errors import DeviceLostError
from pipelines import metrics, schema
from pipelines.cluster.worker_logs import redact_worker
from pipelines.decode import undecodable, wanted_rows
from pipelines.encode import EncodeStage, unencodable
from pipelines.progress import StageMeter, metered
from pipelines.resilience.attempts import attempted, is_suspect, was_restarted
from pipelines.resilience.controls import rows_to_decode
from pipelines.resilience.isolation import IsolatedStage
from pipelines.resilience.turns import Turns
from pipelines.schema import MODALITIES, Modality

# Of a worker that lost its GPU; Ray then starts another.
LOST_GPU_CODE = 3
# Of the memory of a machine or container, for one row: it fits beside Ray's object store (30 %) and
# the workers. Not divided by those: they hardly meet such rows at once, and a large image may take
# more than its share would be.
MEMORY_SHARE = 0.25

_log = logging.getLogger(__name__)


def decode_task(
    table: pa.Table,
    *,
    decode: Callable[..., pa.Table],
    modalities: Sequence[Modality],
    carry_columns: Sequence[str],
    max_bytes: int,
    meter: StageMeter | None,
) -> pa.Table:
    """Decode a batch of canonical rows within a task of Ray.

    Args:
        table: The rows.
        decode: `decode_batch`, given all but them and a meter.
        modalities: As given to it.
        carry_columns: The same.
        max_bytes: See `row_bytes_here`.
        meter: For it.

    Returns:
        As of `decode_batch`; rows that cannot be decoded without harm are rejects.

    Raises:
        WorkerDeathError: Workers die of it again and again, and no row is at fault.
    """
    redact_worker()
    if not is_suspect():
        return decode(table, meter=meter)
    parts = []
    isolated_stage = IsolatedStage(
        # There it makes what is called: `decode` without a meter.
        partial(partial, decode),
        control=rows_to_decode,
        max_bytes=row_bytes_here(max_bytes),
        called="decoding",
    )
    work = f"decoding {table.num_rows} rows"
    with attempted(work, meter=meter), metered(meter) as size, isolated_stage as stage:
        for modality in modalities:
            rows = _with_only(table, modality=modality)
            isolated = stage(rows)
            rejects = None
            if isolated.poison:
                rejects = undecodable(
                    rows, isolated.poison, modality=modality, carry_columns=carry_columns
                )
            parts.append(isolated.joined(rejects))
        decoded = pa.concat_tables(parts)
        size(decoded.num_rows, decoded.nbytes)
    return decoded


def row_bytes_here(max_bytes: int) -> int:
    """Of memory that a row may make a process on this machine take on; at most `max_bytes`."""
    return min(max_bytes, int(MEMORY_SHARE * get_system_memory()))


def _with_only(table: pa.Table, *, modality: Modality) -> pa.Table:
    """The rows of which this modality is wanted, and of them nothing else."""
    rows = wanted_rows(table, modality=modality)
    for other, name in schema.WANTED.items():
        if other != modality and name in rows.column_names:
            none = pa.array(np.zeros(rows.num_rows, dtype=np.bool_))
            rows = rows.set_column(rows.column_names.index(name), name, none)
    return rows


class EncodeActor:
    """An `EncodeStage` within an actor of Ray. Several threads may call it."""

    def __init__(
        self,
        *,
        load: Callable[..., EncodeStage],
        control: Callable[[pa.Schema], pa.Table],
        max_bytes: int,
        type_: pa.DataType,
        meter: StageMeter,
        decode_meter: StageMeter,
    ) -> None:
        """Load the stage, but not in the place of an actor that died.

        That one may have died of loading it, and the next would, without end: so the first batch
        loads it, and if that is begun too often, a process of its own does, whose end is noticed.

        Args:
            load: `EncodeStage`, given all but meters.
            control: See `IsolatedStage`.
            max_bytes: See `row_bytes_here`.
            type_: See `encode.embedding_type`.
            meter: For it.
            decode_meter: The same.
        """
        self._load = partial(load, meter=meter, decode_meter=decode_meter)
        self._isolated = IsolatedStage(
            partial(_checked, partial(load, meter=None, decode_meter=None)),
            control=control,
            max_bytes=row_bytes_here(max_bytes),
            called="the encoder",
        )
        self._type = type_
        self._meter, self._decode_meter = meter, decode_meter
        self._stage: EncodeStage | None = None
        self._loading = threading.Lock()
        # Alone go batches of which this process may die. Beside them nothing is loaded, which may
        # not fit on one GPU together.
        self._turns = Turns()
        redact_worker()
        if not was_restarted():
            self._stage = self._load()

    def __call__(self, table: pa.Table) -> pa.Table:
        """As of `EncodeStage`; rows that cannot be encoded without harm are rejects.

        Raises:
            WorkerDeathError: Workers die of it again and again, and no row is at fault.
        """
        if is_suspect():
            work = f"encoding {table.num_rows} rows"
            with self._turns.alone(), attempted(work, meter=self._meter):
                return self._survived(table)
        with self._turns.together():
            stage = self._loaded()
            try:
                return stage(table)
            except DeviceLostError as error:
                # All that this process still has to do would fail too.
                _log.error("%s; this worker ends, and what it was at is done again", error)
                os._exit(LOST_GPU_CODE)

    def _loaded(self) -> EncodeStage:
        with self._loading:
            if self._stage is None:
                self._isolated.close()
                self._stage = self._load()
            return self._stage

    def _survived(self, table: pa.Table) -> pa.Table:
        with self._meter.batch() as size:
            isolated = self._isolated(table)
            size(table.num_rows, 0)
            if self._stage is not None:  # one engine on a GPU is enough
                self._isolated.close()
        for modality in MODALITIES:
            num_rows = sum(
                pc.sum(
                    pc.and_(
                        pc.equal(part[schema.MODALITY], modality),
                        pc.is_valid(part[schema.EMBEDDING]),
                    )
                ).as_py()
                or 0
                for part in isolated.parts
            )
            self._meter.add(metrics.ENCODED, num_rows, {"modality": modality})
        # As long as it took is among the seconds of encoding.
        came_encoded = table[schema.ENCODED].is_valid().to_pylist()
        num_decoded = sum(
            is_one and row not in isolated.poison for row, is_one in enumerate(came_encoded)
        )
        if num_decoded:
            self._decode_meter.count(num_decoded, 0, 0.0)
        rejects = None
        if isolated.poison:
            rejects = unencodable(table, isolated.poison, type_=self._type)
        return isolated.joined(rejects)


def _checked(load: Callable[[], EncodeStage]) -> EncodeStage:
    """A stage whose engine is loaded: that it cannot be is no fault of the rows that come next."""
    stage = load()
    stage.check()
    return stage
