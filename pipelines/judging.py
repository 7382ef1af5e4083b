"""Judges an engine here: loads it, its reference and a baseline, and runs the gate.

Knows nothing of how engines are built or promoted.
"""

import os
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING

from engine.accuracy import Thresholds
from engine.backends.choice import Backend, Machine, load_encoder
from engine.backends.encoder import Encoder
from engine.gate import GateReport, run_gate
from engine.plans.plan import BULK, QUERY, PlanProfile
from engine.progress import OnProgress
from engine.registry import Engine, Registry
from engine.sample import Sample

if TYPE_CHECKING:
    from engine.model import Model

GPU_BATCH_SIZES = (1, 8, 64, 256)


def judge(
    engine: Engine,
    *,
    model: "Model",
    held_out: Sample,
    thresholds: Thresholds,
    registry: Registry,
    baseline: Engine | None,
    backend: Backend,
    machine: Machine,
    device: str,
    on_progress: OnProgress,
) -> GateReport:
    """Run the gate of an engine on this machine, beside the float32 reference.

    Args:
        engine: With the plans of both profiles if TensorRT runs it.
        model: The checkpoint's towers.
        held_out: Rows that the engine was not calibrated with.
        thresholds: How close it must be.
        registry: Where the engine is kept.
        baseline: An fp16 engine of the checkpoint, to compare speed and memory with.
        backend: What runs engine and baseline.
        machine: What this machine is.
        device: Where the reference runs: `cpu` or `cuda`.
        on_progress: See `run_gate`.

    Raises:
        QuantizationError: Of an fp16 engine: activations are beyond 16 bit.
        DeviceError, PlanError, EngineError: It cannot be loaded or run here.
    """
    from engine.quantization.half_precision import watched_activations

    with ExitStack() as stack:

        def loaded(engine: Engine, profile: PlanProfile) -> Encoder:
            encoder = load_encoder(
                engine,
                backend=backend,
                registry=registry,
                num_threads=len(os.sched_getaffinity(0)),
                profile=profile,
            )
            return stack.enter_context(closing(encoder))

        has_query_plan = backend == "tensorrt"  # the others take any number of rows
        baseline_name = f"fp16 {backend}"
        baselines, query_baselines = {}, {}
        encoder = loaded(engine, BULK)
        query_encoder = loaded(engine, QUERY) if has_query_plan else None
        if baseline is not None:
            baselines[baseline_name] = loaded(baseline, BULK)
            if has_query_plan:
                query_baselines[baseline_name] = loaded(baseline, QUERY)
        if engine.manifest.precision == "fp16":
            # What executes it here may compute in more than 16 bit, and would overflow elsewhere.
            for tower in filter(None, (model.image_tower, model.text_tower)):
                stack.enter_context(watched_activations(tower))
        return run_gate(
            encoder,
            _reference(model, engine, device=device),
            held_out,
            thresholds=thresholds,
            backend=backend,
            device="CPU" if backend == "onnxruntime" else str(machine.architecture),
            baselines=baselines,
            batch_sizes=() if backend == "onnxruntime" else GPU_BATCH_SIZES,
            on_progress=on_progress,
            query_encoder=query_encoder,
            query_baselines=query_baselines,
        )


def _reference(model: "Model", engine: Engine, *, device: str) -> Encoder:
    from engine.reference import ReferenceEncoder

    return ReferenceEncoder(
        model, engine_dir=engine.directory, manifest=engine.manifest, device=device
    )
