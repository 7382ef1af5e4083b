"""From a checkpoint and a catalog to a promoted engine: sample, build, compile, gate, promote.

Knows nothing of the command line, and does all of it on this machine.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from engine.accuracy import Thresholds
from engine.backends.choice import (
    FIRST_FP8_ARCHITECTURE,
    Wanted,
    choose_backend,
    this_machine,
)
from engine.build import load_or_build
from engine.checkpoint import Checkpoint, find_checkpoint
from engine.errors import PlanError
from engine.gate import GateReport
from engine.gate_reports import add_gate_report
from engine.manifest import Manifest, Precision
from engine.plans.plan import BULK, QUERY, Flavour, PlanProfile, PlanRecord, read_plan
from engine.plans.plan_builder import PlanConfig, plan_key
from engine.plans.plan_registry import obtain_plan
from engine.progress import OnProgress
from engine.promotion import promote, promoted
from engine.registry import Engine, Registry, default_engines_uri
from engine.sample import MIN_ROWS, Sample
from pipelines.gate_page import render_gate_page
from pipelines.json_text import json_text
from pipelines.judging import judge
from pipelines.sampling import SampleConfig, draw_samples

if TYPE_CHECKING:
    from engine.model import Model


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildConfig:
    """Which engine to build, and what it must show."""

    checkpoint: str
    """Hub id or folder."""
    sample: SampleConfig
    """Rows to calibrate with, which fp16 does without, and to judge by."""
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
        num_rows = self.sample.num_rows
        if self.precision == "fp8" and num_rows < MIN_ROWS:
            raise ValueError(
                f"sample.num_rows={num_rows} (--rows): expected at least {MIN_ROWS} to calibrate "
                "fp8 with"
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
    plans: tuple[PlanRecord, ...]
    """What the same are, and which of their products fell back to 16 bit."""
    is_promoted: bool
    """Whether the engine is the current one of its checkpoint now."""


def build_engine(config: BuildConfig, *, on_progress: OnProgress) -> BuildResult:
    """Build an engine unless it is there, judge it, and promote it if it passes.

    Args:
        config: Which, and how good.
        on_progress: Called with a stage's name, and how many of how many steps are done; 0 of 0
            for a stage that does not count.

    A passed engine gets the plans that are wanted ahead of time, and is promoted after those.

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
    _check_architectures(config)
    checkpoint = find_checkpoint(config.checkpoint, revision=config.revision)
    model = load_model(checkpoint)
    calibration, held_out = draw_samples(
        config.sample if config.precision == "fp8" else replace(config.sample, num_rows=0),
        preprocessing=model.preprocessing,
        modalities=("image",) if model.text_tower is None else ("image", "text"),
        on_progress=on_progress,
    )
    device = "cuda" if machine.has_torch else "cpu"
    plan_dirs: list[Path] = []
    with _device_errors(device):
        engine = _obtain(
            config, checkpoint, model, registry, calibration, device=device, on_progress=on_progress
        )
        if backend == "tensorrt":
            on_progress("compile", 0, 0)
            plan_dirs += _plans(engine, registry=registry)
        baseline = None
        if backend != "onnxruntime" and config.precision == "fp8":
            on_progress("build fp16 to compare with", 0, 0)
            baseline = load_or_build(checkpoint, registry=registry, precision="fp16")
        report = judge(
            engine,
            model=model,
            held_out=held_out,
            thresholds=config.thresholds,
            registry=registry,
            baseline=baseline,
            backend=backend,
            machine=machine,
            device=device,
            on_progress=on_progress,
        )
    manifest = engine.manifest
    kept = add_gate_report(
        registry,
        manifest.engine_id,
        passed=report.passed,
        files={
            "report.json": json_text(report, indent=1).encode(),
            "report.html": render_gate_page(report, manifest=manifest).encode(),
        },
    )
    if report.passed:
        for architecture in config.plans_for:
            on_progress(f"compile for {architecture}", 0, 0)
            plan_dirs += _plans(
                engine, registry=registry, flavour="tensorrt_rtx", architecture=architecture
            )
        promote(registry, manifest.engine_id)
    return BuildResult(
        manifest=manifest,
        gate=report,
        report_path=registry.root.full_path(kept.path),
        plan_paths=tuple(map(str, plan_dirs)),
        plans=tuple(map(read_plan, plan_dirs)),
        is_promoted=promoted(registry, manifest.checkpoint_digest) == manifest.engine_id,
    )


def _obtain(
    config: BuildConfig,
    checkpoint: Checkpoint,
    model: "Model",
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


def _device_errors(device: str) -> AbstractContextManager[None]:
    if device == "cpu":
        return nullcontext()
    import torch

    from engine.backends.torch_device import typed_errors

    return typed_errors(torch.device(device, torch.cuda.current_device()))


def _check_architectures(config: BuildConfig) -> None:
    """Raise before hours are spent if TensorRT for RTX cannot compile what is wanted of it."""
    for architecture in config.plans_for:
        plan_key(PlanConfig(flavour="tensorrt_rtx", architecture=architecture))
        if config.precision == "fp8" and int(architecture[3:]) < FIRST_FP8_ARCHITECTURE:
            raise PlanError(
                f"--plans-for {architecture}: that GPU has no FP8; leave it out, and build an fp16 "
                "engine for it (`clipmill engine build --precision fp16`)"
            )


def _plans(
    engine: Engine,
    *,
    registry: Registry,
    flavour: Flavour | None = None,
    architecture: str | None = None,
) -> list[Path]:
    profiles: tuple[PlanProfile, ...] = (BULK, QUERY)
    return [
        obtain_plan(
            engine, registry=registry, profile=profile, flavour=flavour, architecture=architecture
        )
        for profile in profiles
    ]
