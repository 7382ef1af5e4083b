"""ONNX -> plans, with TensorRT 10.13 to 11 or TensorRT for RTX.

Knows nothing of who builds when, or where engines are kept: it fills the folder it is given.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.device import open_device
from engine.errors import DeviceError, PlanError
from engine.manifest import IMAGE_ONNX, TEXT_ONNX, file_digest, read_manifest
from engine.plans.plan import (
    BULK,
    Flavour,
    PlanKey,
    PlanProfile,
    PlanRecord,
    Shape,
    Tower,
    TowerPlan,
    input_shapes,
    layers_file,
    plan_file,
)
from engine.plans.plan_layers import (
    Layer,
    activation_bytes_from_log,
    fallbacks,
    layers_from_inspector,
    layers_from_log,
    layers_json,
)
from engine.plans.runtimes import Library, installed_library
from engine.plans.timing_cache import TimingCache

OLDEST_TENSORRT = (10, 13)  # native FP8 in strongly typed networks, as this module builds them
_ONNX_FILES: dict[Tower, str] = {"image": IMAGE_ONNX, "text": TEXT_ONNX}


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanConfig:
    """What to build."""

    profile: PlanProfile = BULK
    """Rows at a time."""
    flavour: Flavour | None = None
    """Whose plan; None for TensorRT, or TensorRT for RTX where it is the only one installed."""
    architecture: str | None = None
    """GPU to build for (`sm_89`), which TensorRT for RTX needs not have; None for the one here."""
    fp8_products: Mapping[Tower, frozenset[str]] = field(default_factory=dict)
    """ONNX MatMul nodes that the graphs want in FP8, to tell which of them fell back."""
    timing_cache_dir: Path | None = None
    """Folder of TensorRT's measurements of kernels (`engine/plans/timing_cache.py`), which builds
    may share; None measures anew."""


def plan_key(config: PlanConfig) -> PlanKey:
    """The key of the plan that a config builds on this machine.

    Raises:
        DeviceError: There is no TensorRT; or no GPU, and no architecture is named.
        PlanError: The library is too old, or does not build for the named architecture here.
    """
    library = installed_library(config.flavour)
    if library.flavour == "tensorrt":
        architecture = _architecture_here(config)
        if tuple(map(int, library.version.split(".")[:2])) < OLDEST_TENSORRT:
            oldest = ".".join(map(str, OLDEST_TENSORRT))
            raise PlanError(f"TensorRT {library.version} is too old, {oldest} is needed: upgrade")
    else:
        architecture = config.architecture or _architecture_of_gpu()
        _compute_capability(library, architecture)
    return PlanKey(
        flavour=library.flavour,
        version=library.version,
        architecture=architecture,
        profile=config.profile,
    )


def _architecture_of_gpu() -> str:
    try:
        return open_device().architecture
    except DeviceError as error:
        raise DeviceError(f"{error}; or name an architecture to build for") from error


def _architecture_here(config: PlanConfig) -> str:
    wanted = config.architecture
    advice = "use TensorRT for RTX (`pip install 'clipmill[rtx]'`) or run on such a card"
    try:
        here = open_device().architecture
    except DeviceError as error:
        if wanted is None:
            raise
        raise PlanError(
            f"TensorRT builds only for the card at hand, and here is none, for {wanted}: {advice}"
        ) from error
    if wanted not in (None, here):
        raise PlanError(
            f"TensorRT builds only for the card at hand, {here}, not for {wanted}: {advice}"
        )
    return here


def _compute_capability(library: Library, architecture: str) -> Any:
    known = {
        f"sm_{name[2:]}": value
        for name, value in library.api.ComputeCapability.__members__.items()
        if name.startswith("SM")
    }
    if architecture not in known:
        raise PlanError(
            f"TensorRT for RTX {library.version} builds for {', '.join(known)}, not for "
            f"{architecture}: use TensorRT (`pip install 'clipmill[gpu]'`) on such a card"
        )
    return known[architecture]


def build_plans(engine_dir: Path, *, plan_dir: Path, config: PlanConfig) -> PlanRecord:
    """Compile an engine's towers.

    Args:
        engine_dir: The engine's folder.
        plan_dir: An empty folder, which becomes a plan folder (see engine/plans/plan.py).
        config: What to build.

    Returns:
        The record, as written.

    Raises:
        EngineError: The folder holds no whole engine.
        PlanError: The library refuses the graph; its messages are in the text.
        DeviceError: There is no TensorRT, or no GPU where one is needed.
    """
    manifest = read_manifest(engine_dir)
    key = plan_key(config)
    library = installed_library(key.flavour)
    started = time.monotonic()
    towers = {
        tower: _build_tower(
            engine_dir / _ONNX_FILES[tower],
            tower=tower,
            shapes=shapes,
            plan_dir=plan_dir,
            library=library,
            key=key,
            config=config,
        )
        for tower, shapes in input_shapes(manifest, config.profile).items()
    }
    record = PlanRecord(
        engine_id=manifest.engine_id,
        key=key,
        image=towers["image"],
        text=towers.get("text"),
        build_seconds=round(time.monotonic() - started, 3),
        files={path.name: file_digest(path) for path in sorted(plan_dir.iterdir())},
    )
    record.write(plan_dir)
    return record


def _build_tower(
    onnx_path: Path,
    *,
    tower: Tower,
    shapes: tuple[Shape, Shape],
    plan_dir: Path,
    library: Library,
    key: PlanKey,
    config: PlanConfig,
) -> TowerPlan:
    timing_cache = None
    if library.flavour == "tensorrt" and config.timing_cache_dir is not None:
        timing_cache = TimingCache(config.timing_cache_dir, key)
    with library.log.recording() as messages:
        plan = _compiled(
            onnx_path, shapes=shapes, library=library, key=key, timing_cache=timing_cache
        )
        layers: list[Layer]
        activation_bytes: int | None
        if _is_here(key.architecture):
            layers, activation_bytes = _inspected(plan, onnx_path, library)
        else:
            layers = layers_from_log(messages)
            activation_bytes = activation_bytes_from_log(messages)
    if not layers:
        raise PlanError(f"{onnx_path}: {library.flavour} {library.version} names no layers")
    (plan_dir / plan_file(tower)).write_bytes(memoryview(plan))
    (plan_dir / layers_file(tower)).write_text(layers_json(layers))
    fp8_products = config.fp8_products.get(tower, frozenset())
    fell_back = fallbacks(layers, fp8_products=fp8_products)
    return TowerPlan(
        min_shape=shapes[0],
        max_shape=shapes[1],
        plan_bytes=plan.nbytes,
        activation_bytes=activation_bytes,
        num_fp8_products=len(fp8_products) - len(fell_back),
        fallbacks=fell_back,
    )


def _compiled(
    onnx_path: Path,
    *,
    shapes: tuple[Shape, Shape],
    library: Library,
    key: PlanKey,
    timing_cache: TimingCache | None,
) -> Any:
    """The serialized plan, an `IHostMemory`."""
    api = library.api
    try:
        builder = api.Builder(library.logger)
    except TypeError as error:  # what the binding makes of a null pointer
        raise DeviceError(
            f"{library.flavour} {library.version} does not start: {library.log.errors}"
        ) from error
    # The types are those of the graph. TensorRT 11 knows no other way, and ignores the flag.
    flags = 1 << int(api.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flags)
    parser = api.OnnxParser(network, library.logger)
    if not (parser.parse_from_file(str(onnx_path)) and network.num_inputs):
        raise PlanError(
            f"{onnx_path}: {library.flavour} {library.version} cannot read it "
            f"({_parser_errors(parser) or library.log.errors})"
        )
    config = builder.create_builder_config()
    config.profiling_verbosity = api.ProfilingVerbosity.DETAILED
    # float32 means float32. REFIT stays off: in TensorRT 11.3 it can drop the bias of a product.
    config.clear_flag(api.BuilderFlag.TF32)
    if library.flavour == "tensorrt_rtx":
        config.num_compute_capabilities = 1
        config.set_compute_capability(_compute_capability(library, key.architecture), 0)
        # Without, a run cannot be captured as a CUDA graph.
        config.set_flag(api.BuilderFlag.REQUIRE_USER_ALLOCATION)
    profile = builder.create_optimization_profile()
    smallest, largest = shapes
    profile.set_shape(network.get_input(0).name, smallest, largest, largest)
    config.add_optimization_profile(profile)
    if timing_cache is not None:
        timing_cache.attach(config)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise PlanError(
            f"{onnx_path}: {library.flavour} {library.version} cannot compile it for "
            f"{key.architecture} ({library.log.errors})"
        )
    if timing_cache is not None:
        timing_cache.publish(config)
    return plan


def _parser_errors(parser: Any) -> str:
    errors = [parser.get_error(number) for number in range(parser.num_errors)]
    nodes = [f"{error.node_operator()} {error.node_name()}: ".lstrip(" :") for error in errors]
    return "; ".join(node + error.desc() for node, error in zip(nodes, errors, strict=True))


def _is_here(architecture: str) -> bool:
    try:
        return open_device().architecture == architecture
    except DeviceError:
        return False


def _inspected(plan: Any, onnx_path: Path, library: Library) -> tuple[list[Layer], int]:
    """Layers and scratch bytes of a plan that can be loaded here."""
    engine = library.api.Runtime(library.logger).deserialize_cuda_engine(plan)
    if engine is None:
        raise PlanError(
            f"{onnx_path}: {library.flavour} {library.version} cannot load its own plan "
            f"({library.log.errors})"
        )
    inspector = engine.create_engine_inspector()
    information = inspector.get_engine_information(library.api.LayerInformationFormat.JSON)
    return layers_from_inspector(information), int(engine.device_memory_size_v2)
