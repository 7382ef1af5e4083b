"""From a checkpoint and a catalog to a promoted engine: sample, build, compile, gate, promote.

Knows nothing of the command line, and does all of it on this machine.
"""

import dataclasses
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from engine.accuracy import Thresholds
from engine.backends.choice import (
    Backend,
    Wanted,
    choose_backend,
    load_encoder,
    this_machine,
)
from engine.backends.encoder import Encoder
from engine.build import load_or_build
from engine.checkpoint import Checkpoint, find_checkpoint
from engine.gate import GateReport, run_gate
from engine.gate_reports import add_gate_report
from engine.manifest import Manifest, Precision
from engine.plans.plan import BULK, QUERY, PlanProfile
from engine.plans.plan_registry import obtain_plan
from engine.promotion import promote
from engine.registry import Engine, Registry, default_engines_uri
from engine.sample import Sample
from pipelines.gate_page import render_gate_page
from pipelines.sampling import SampleConfig, draw_samples
from pipelines.strict_json import strict_json

GPU_BATCH_SIZES = (1, 8, 64, 256)
CPU_THREADS = 2

OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildConfig:
    """Which engine to build, and what it must show."""

    checkpoint: str
    """Hub id or folder."""
    sample: SampleConfig
    """Rows to calibrate with, and to judge by."""
    revision: str | None = None
    """Hub branch, tag or commit."""
    precision: Precision = "fp8"
    """fp8, or fp16 for cards without it."""
    thresholds: Thresholds = field(default_factory=Thresholds)
    """How close to float32 the engine must be."""
    backend: Wanted = "auto"
    """What executes the engine at its gate: what will execute it later."""
    plans_for: tuple[str, ...] = ()
    """Architectures (`sm_89`) to compile for ahead of time, with TensorRT for RTX."""
    engines_uri: str = field(default_factory=default_engines_uri)
    """Where engines are kept."""

    def __post_init__(self) -> None:
        """Check the bounds."""
        if self.precision == "fp32":
            raise ValueError(
                "precision='fp32': such an engine is the reference itself and is built when it is "
                "first used; expected fp8 or fp16"
            )


@dataclass(frozen=True, kw_only=True)
class BuildResult:
    """What came of it."""

    manifest: Manifest
    """Of the engine."""
    gate: GateReport
    """What its gate saw."""
    report_path: str
    """Folder of the gate's report."""
    plan_paths: tuple[str, ...]
    """Folders of plans on this machine."""
    is_promoted: bool
    """Whether the engine is the current one of its checkpoint now."""


def build_engine(config: BuildConfig, *, on_progress: OnProgress) -> BuildResult:
    """Build an engine unless it is there, judge it, and promote it if it passes.

    Args:
        config: Which, and how good.
        on_progress: Called with a stage's name, and how many of how many steps are done; 0 of 0
            for a stage that does not count.

    Raises:
        CheckpointError, CatalogError: There is not what to build from.
        QuantizationError: The sample or a layer does not allow the precision.
        DeviceError, PlanError: It cannot be compiled or run here.
        EngineError: The registry cannot be read or written.
    """
    # torch and transformers: heavy, and needed here alone.
    from engine.model import load_model

    registry = Registry(config.engines_uri)
    machine = this_machine()
    backend = choose_backend(config.backend, precision=config.precision, machine=machine)
    checkpoint = find_checkpoint(config.checkpoint, revision=config.revision)
    model = load_model(checkpoint)
    calibration, held_out = draw_samples(
        config.sample,
        preprocessing=model.preprocessing,
        modalities=("image",) if model.text_tower is None else ("image", "text"),
        on_progress=on_progress,
    )
    device = "cuda" if machine.has_torch else "cpu"
    engine = _obtain(
        config, checkpoint, model, registry, calibration, device=device, on_progress=on_progress
    )
    on_progress("compile", 0, 0)
    plans = _plans(config, engine, registry=registry, backend=backend)
    with ExitStack() as loaded:
        load = partial(load_encoder, backend=backend, registry=registry, num_threads=CPU_THREADS)
        encoder = _entered(loaded, load(engine))
        baselines: dict[str, Encoder] = {}
        if backend != "onnxruntime" and config.precision == "fp8":
            on_progress("build fp16 to compare with", 0, 0)
            fp16 = load_or_build(checkpoint, registry=registry, precision="fp16")
            baselines[f"fp16 {backend}"] = _entered(loaded, load(fp16))
        report = run_gate(
            encoder,
            _reference(model, engine, device=device),
            held_out,
            thresholds=config.thresholds,
            backend=backend,
            device="CPU" if backend == "onnxruntime" else str(machine.architecture),
            baselines=baselines,
            batch_sizes=() if backend == "onnxruntime" else GPU_BATCH_SIZES,
            on_progress=on_progress,
        )
    manifest = engine.manifest
    kept = add_gate_report(
        registry,
        manifest.engine_id,
        passed=report.passed,
        files={
            "report.json": _report_json(report).encode(),
            "report.html": render_gate_page(report, manifest=manifest).encode(),
        },
    )
    if report.passed:
        promote(registry, manifest.engine_id)
    return BuildResult(
        manifest=manifest,
        gate=report,
        report_path=registry.root.full_path(kept.path),
        plan_paths=plans,
        is_promoted=report.passed,
    )


def _obtain(
    config: BuildConfig,
    checkpoint: Checkpoint,
    model: Any,
    registry: Registry,
    calibration: Sample,
    *,
    device: str,
    on_progress: OnProgress,
) -> Engine:
    if config.precision == "fp16":
        on_progress("export", 0, 0)
        return load_or_build(checkpoint, registry=registry, precision="fp16")
    from engine.build_fp8 import build_fp8, fp8_engine_id

    return registry.obtain(
        fp8_engine_id(checkpoint, sample=calibration, thresholds=config.thresholds),
        lambda directory: build_fp8(
            checkpoint,
            model,
            directory,
            sample=calibration,
            thresholds=config.thresholds,
            device=device,
            on_progress=on_progress,
        ),
    )


def _plans(
    config: BuildConfig, engine: Engine, *, registry: Registry, backend: Backend
) -> tuple[str, ...]:
    obtain = partial(obtain_plan, engine, registry=registry)
    profiles: tuple[PlanProfile, ...] = (BULK, QUERY)
    found = [
        obtain(profile=profile, flavour="tensorrt_rtx", architecture=architecture)
        for architecture in config.plans_for
        for profile in profiles
    ]
    if backend == "tensorrt":
        found += [obtain(profile=profile) for profile in profiles]
    return tuple(map(str, found))


def _reference(model: Any, engine: Engine, *, device: str) -> Encoder:
    from engine.reference import ReferenceEncoder

    return ReferenceEncoder(
        model, engine_dir=engine.directory, manifest=engine.manifest, device=device
    )


def _entered(stack: ExitStack, encoder: Encoder) -> Encoder:
    """An encoder that gives its device's memory back at the end, if it has any."""
    close = getattr(encoder, "close", None)
    if close is not None:
        stack.callback(close)
    return encoder


def _report_json(report: GateReport) -> str:
    return strict_json({"passed": report.passed, **dataclasses.asdict(report)}, indent=1)
