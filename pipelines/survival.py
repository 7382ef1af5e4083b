"""The stages that may be the end of their workers, and what is done so that a run survives that.

Knows nothing of what the stages do.

Ray starts a worker anew that died, maybe on another node, and gives it again what it was at. Where
that happened twice (`attempts.SUSPECT_ATTEMPTS`), the work is done in a process of its own, which
finds the rows that it dies of. Batches that merely were with the same worker are done so too, and
none of their rows is blamed.
"""

import logging
import os
import threading
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine.errors import DeviceLostError
from pipelines import metrics, schema
from pipelines.attempts import check_attempts, is_suspect, was_restarted
from pipelines.decode import undecodable, wanted_rows
from pipelines.encode import EncodeStage, unencodable
from pipelines.isolation import IsolatedStage
from pipelines.progress import StageMeter, metered
from pipelines.schema import MODALITIES, Modality

# Of a worker that lost its GPU; Ray then starts another.
LOST_GPU_CODE = 3

_log = logging.getLogger(__name__)


def decode_task(
    table: pa.Table,
    *,
    decode: Callable[..., pa.Table],
    modalities: Sequence[Modality],
    carry_columns: Sequence[str],
    meter: StageMeter | None,
) -> pa.Table:
    """Decode a batch of canonical rows within a task of Ray.

    Args:
        table: The rows.
        decode: `decode_batch`, given all but them and a meter.
        modalities: As given to it.
        carry_columns: The same.
        meter: For it.

    Returns:
        As of `decode_batch`; rows that cannot be decoded without harm are rejects.

    Raises:
        WorkerDeathError: Workers die of it again and again, and no row is at fault.
    """
    check_attempts(f"decoding {table.num_rows} rows")
    if not is_suspect():
        return decode(table, meter=meter)
    parts = []
    # There it makes what is called: `decode` without a meter.
    load = partial(partial, decode)
    with metered(meter) as size, IsolatedStage(load, called="decoding") as stage:
        for modality in modalities:
            rows = _with_only(table, modality=modality)
            isolated = stage(rows)
            parts += isolated.parts
            if isolated.poison:
                parts.append(
                    undecodable(
                        rows, isolated.poison, modality=modality, carry_columns=carry_columns
                    )
                )
        decoded = pa.concat_tables(parts)
        size(decoded.num_rows, decoded.nbytes)
    return decoded


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
        type_: pa.DataType,
        meter: StageMeter,
        decode_meter: StageMeter,
    ) -> None:
        """Load the stage, but not in the place of an actor that died.

        That one may have died of loading it, and the next would, without end: so the first batch
        loads it, and if that is begun too often, a process of its own does, whose end is noticed.

        Args:
            load: `EncodeStage`, given all but meters.
            type_: See `encode.embedding_type`.
            meter: For it.
            decode_meter: The same.
        """
        self._load = partial(load, meter=meter, decode_meter=decode_meter)
        self._isolated = IsolatedStage(
            partial(_checked, partial(load, meter=None, decode_meter=None)), called="the encoder"
        )
        self._type = type_
        self._meter = meter
        self._stage: EncodeStage | None = None
        # Held while either is loaded or the process works: both may not fit on one GPU.
        self._loading = threading.Lock()
        if not was_restarted():
            self._stage = self._load()

    def __call__(self, table: pa.Table) -> pa.Table:
        """As of `EncodeStage`; rows that cannot be encoded without harm are rejects.

        Raises:
            WorkerDeathError: Workers die of it again and again, and no row is at fault.
        """
        check_attempts(f"encoding {table.num_rows} rows")
        if is_suspect():
            return self._survived(table)
        stage = self._loaded()
        try:
            return stage(table)
        except DeviceLostError as error:
            # All that this process still has to do would fail too.
            _log.error("%s; this worker ends, and what it was at is done again", error)
            os._exit(LOST_GPU_CODE)

    def _loaded(self) -> EncodeStage:
        if self._stage is not None:
            return self._stage
        with self._loading:
            if self._stage is None:
                self._isolated.close()
                self._stage = self._load()
            return self._stage

    def _survived(self, table: pa.Table) -> pa.Table:
        with self._loading, self._meter.batch() as size:
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
        if not isolated.poison:
            return pa.concat_tables(isolated.parts)
        rejects = unencodable(table, isolated.poison, type_=self._type)
        return pa.concat_tables([*isolated.parts, rejects])


def _checked(load: Callable[[], EncodeStage]) -> EncodeStage:
    """A stage whose engine is loaded: that it cannot be is no fault of the rows that come next."""
    stage = load()
    stage.check()
    return stage
