"""Which engine, backend and decoder a run uses: chosen before it starts, for all its workers.

Knows nothing of the rows that it encodes.
"""

import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import cast

from engine.backends.choice import (
    NO_GPU,
    WANTED,
    Backend,
    Machine,
    Wanted,
    choose_backend,
    remark_on,
    this_machine,
)
from engine.build import engine_id_of, load_or_build, unquantized_precision
from engine.checkpoint import find_checkpoint
from engine.errors import DeviceError, EngineError, GateError
from engine.gate_reports import check_gate
from engine.manifest import Manifest, Precision
from engine.preprocess import Preprocessing
from engine.promotion import promoted
from engine.registry import Engine, Registry, default_engines_uri
from pipelines.cluster.autoscaler import can_grow
from pipelines.cluster.gpu_probe import Look, num_gpus
from pipelines.schema import WANTED_DECODERS, Decoder, WantedDecoder
from pipelines.snapshots import EngineRecord

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineChoice:
    """What a run is to encode with."""

    checkpoint: str | None = None
    """Hub id, or a folder that all nodes can read: its promoted engine, else its fp32 one."""
    revision: str | None = None
    """Hub branch, tag or commit."""
    engine_id: str | None = None
    """One engine by its id, in the place of a checkpoint."""
    precision: Precision | None = None
    """Of the checkpoint's engine: an error if another one is promoted. None takes what is."""
    backend: Wanted = "auto"
    """What executes it."""
    decoder: WantedDecoder = "auto"
    """Where JPEGs are decoded: auto takes the GPU that the engine runs on, if it can."""
    engines_uri: str = field(default_factory=default_engines_uri)
    """Where engines are kept: a folder, each node's own or shared, or any fsspec URI."""

    def __post_init__(self) -> None:
        """Check what can be checked without looking."""
        if (self.checkpoint is None) == (self.engine_id is None):
            raise ValueError("name either a checkpoint or an engine, by its id")
        if self.engine_id is not None and (self.revision or self.precision):
            raise ValueError(f"engine {self.engine_id} has a revision and a precision of its own")
        if self.backend not in WANTED:
            raise ValueError(f"backend={self.backend!r}: expected one of {', '.join(WANTED)}")
        if self.decoder not in WANTED_DECODERS:
            raise ValueError(
                f"decoder={self.decoder!r}: expected one of {', '.join(WANTED_DECODERS)}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Execution:
    """What does the work of a run."""

    backend: Backend
    """Executes the engine."""
    decoder: Decoder
    """Decodes JPEGs."""


def chosen_engine(choice: EngineChoice, *, registry: Registry) -> EngineRecord:
    """Find out which engine a choice means; it need not be built yet if it is fp32.

    Raises:
        CheckpointError: The checkpoint cannot be found.
        GateError: The engine may not be used: its gate failed or never ran.
        EngineError: There is no such engine.
    """
    if choice.engine_id is not None:
        return _engine_by_id(choice.engine_id, registry=registry)
    assert choice.checkpoint is not None
    checkpoint = find_checkpoint(choice.checkpoint, revision=choice.revision)
    wanted = choice.precision
    engine_id = promoted(registry, checkpoint.digest)
    if engine_id is None or (wanted is not None and not engine_id.startswith(f"{wanted}-")):
        if wanted not in (None, "fp32"):
            current = f"; {engine_id} is" if engine_id else ""
            raise GateError(
                f"engines {registry.uri}: no {wanted} engine of {choice.checkpoint} is promoted"
                f"{current}. Build, check and promote one: `clipmill engine build --precision "
                f"{wanted} --checkpoint {choice.checkpoint} --calibrate CATALOG`"
            )
        engine_id = engine_id_of(checkpoint)
    check_gate(registry, engine_id)
    manifest = registry.manifest(engine_id)
    return EngineRecord(
        engine_id=engine_id,
        checkpoint=checkpoint.location,
        revision=checkpoint.revision,
        weights=None if manifest is None else manifest.weights,
    )


def _engine_by_id(engine_id: str, *, registry: Registry) -> EngineRecord:
    manifest = registry.manifest(engine_id)
    if manifest is None:
        raise EngineError(
            f"engines {registry.uri}: no engine {engine_id}; `clipmill engine list` shows those "
            "there are"
        )
    check_gate(registry, engine_id)
    return EngineRecord(
        engine_id=engine_id,
        checkpoint=manifest.checkpoint,
        revision=manifest.revision,
        weights=manifest.weights,
    )


def chosen_backend(wanted: Wanted, *, engine: EngineRecord, look: Look) -> Backend:
    """Choose what executes an engine on this cluster, by a look at one of its GPUs if need be.

    Args:
        wanted: What was asked for.
        engine: What is to be executed.
        look: Of `gpu_probe`.

    Raises:
        DeviceError, EngineError: As for `choose_backend`.
        PlacementError: No GPU could be looked at in time.
    """
    precision = cast("Precision", engine.engine_id.partition("-")[0])
    machine = NO_GPU
    # That there is no GPU now says nothing where an autoscaler starts nodes for who asks.
    if wanted != "onnxruntime" and precision != "fp32" and (num_gpus() or can_grow()):
        machine = _gpu_worker(look)
    backend = choose_backend(wanted, precision=precision, machine=machine)
    if wanted == "auto":
        remark = remark_on(backend, precision=precision, machine=machine)
        if remark:
            _log.warning("engine %s runs %s", engine.engine_id, remark)
    return backend


def chosen_decoder(
    wanted: WantedDecoder,
    *,
    backend: Backend,
    ready_manifest: Callable[[], Manifest],
    look: Look,
) -> Decoder:
    """Choose where JPEGs are decoded, by a try on one of the cluster's GPUs.

    Args:
        wanted: What was asked for.
        backend: What executes the engine.
        ready_manifest: Gives the engine's manifest, and builds the engine first if need be; called
            only where a GPU is tried.
        look: Of `gpu_probe`.

    Raises:
        DeviceError: The GPU was asked for and cannot.
        PlacementError: No GPU could be looked at in time.
    """
    if wanted == "cpu" or (wanted == "auto" and backend == "onnxruntime"):
        return "cpu"
    if backend == "onnxruntime":
        raise DeviceError(
            "--decode gpu needs an engine that runs on GPUs, this one runs on CPUs: use --decode "
            "auto, or an fp16 or fp8 engine (`clipmill engine build`)"
        )
    fault: str | None = look(partial(_decoding_fault, ready_manifest().preprocessing))
    if fault is None:
        return "gpu"
    if wanted == "gpu":
        raise DeviceError(f"--decode gpu: {fault}")
    _log.warning("images are decoded by CPUs, since the GPU cannot: %s", fault)
    return "cpu"


def _decoding_fault(preprocessing: Preprocessing) -> str | None:
    for library in ("torch", "triton"):  # which the tensorrt backend does without
        if importlib.util.find_spec(library) is None:
            return f"{library} is not installed, whose kernels resize images there"
    from engine.decoding.gpu_decoder import decoding_fault

    return decoding_fault(preprocessing)


def _gpu_worker(look: Look) -> Machine:
    machine: Machine = look(this_machine)
    if machine.architecture is None:
        raise DeviceError(
            f"Ray counts {num_gpus():g} GPUs, but a worker that was given one sees none: check "
            "`nvidia-smi` on the GPU nodes, or use --backend onnxruntime to run on CPUs"
        )
    return machine


def ready_engine(record: EngineRecord, *, registry: Registry) -> Engine:
    """Find the very engine that a record names; build it only if it is not there.

    Raises:
        CheckpointError: Its checkpoint cannot be found or built from.
        EngineError: The checkpoint there now gives another engine, or the engine takes more than
            a checkpoint to build.
    """
    found = registry.find(record.engine_id)
    if found is not None:
        if found.manifest.weights != record.weights:
            raise EngineError(
                f"engine {record.engine_id} at {registry.uri} is another build of it, with other "
                "weights, than the one asked for: name with --engines the URI where that one is"
            )
        return found
    precision = unquantized_precision(record.engine_id)
    if precision is None:
        raise EngineError(
            f"engine {record.engine_id} is not among the engines at {registry.uri}, and a worker "
            "cannot build it: it was calibrated on a catalog. Name with --engines the URI that it "
            "was built under, one that every node reaches, or build it there with "
            "`clipmill engine build`"
        )
    checkpoint = find_checkpoint(record.checkpoint, revision=record.revision)
    engine_id = engine_id_of(checkpoint, precision=precision)
    if engine_id != record.engine_id:
        raise EngineError(
            f"checkpoint {record.checkpoint} gives engine {engine_id} here, "
            f"{record.engine_id} is needed: its files have changed or differ between machines. "
            "Bring the same files back, or embed into another store"
        )
    return load_or_build(checkpoint, registry=registry, precision=precision)
