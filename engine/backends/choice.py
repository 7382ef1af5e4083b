"""Which backend runs an engine on a machine: chosen once, in the open; and how it is loaded.

Knows nothing of what is encoded, and imports no backend before it is wanted.
"""

import importlib.util
import re
from dataclasses import dataclass
from typing import Literal, get_args

from engine.backends.encoder import Encoder
from engine.device import open_device
from engine.errors import DeviceError, EngineError, NoGpuError, PlanError
from engine.manifest import Precision
from engine.plans.plan import BULK, PlanProfile
from engine.plans.plan_builder import PlanConfig, plan_key
from engine.plans.plan_registry import obtain_plan
from engine.registry import Engine, Registry

Backend = Literal["onnxruntime", "tensorrt", "torch"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
Wanted = Literal["auto", "onnxruntime", "tensorrt", "torch"]
WANTED: tuple[Wanted, ...] = get_args(Wanted)

FIRST_FP8_ARCHITECTURE = 89  # Ada; before it no tensor core multiplies FP8


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What there is to run an engine on."""

    architecture: str | None
    """Of the GPU (`sm_90`); None without one."""
    tensorrt_fault: str | None
    """Why TensorRT can't build and run plans there; None where it can."""
    has_torch: bool
    """Whether PyTorch can use the GPU."""


NO_GPU = Machine(architecture=None, tensorrt_fault="there is no GPU", has_torch=False)


def this_machine() -> Machine:
    """Look at the GPU and the libraries of this process; DeviceError if nothing can use the GPU."""
    try:
        architecture = open_device().architecture
    except NoGpuError:
        return NO_GPU
    except DeviceError as error:
        by_torch = _torch_architecture()
        if by_torch is None:
            raise
        return Machine(architecture=by_torch, tensorrt_fault=str(error), has_torch=True)
    fault = None
    try:
        plan_key(PlanConfig())
    except (DeviceError, PlanError) as error:
        fault = str(error)
    has_torch = _torch_architecture() is not None
    return Machine(architecture=architecture, tensorrt_fault=fault, has_torch=has_torch)


def _torch_architecture() -> str | None:
    """Of the GPU as PyTorch sees it; None if it is not installed or sees none."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


def choose_backend(wanted: Wanted, *, precision: Precision, machine: Machine) -> Backend:
    """Choose what runs an engine.

    Left to choose: TensorRT on a GPU, PyTorch on a GPU without it, ONNX Runtime where there is no
    GPU or the engine is fp32. A GPU that nothing can use is an error, not a reason to use the CPU.

    Raises:
        DeviceError: The machine cannot run it so, with the way out.
        EngineError: The wanted backend does not run engines of this precision.
    """
    if wanted == "onnxruntime" or (wanted == "auto" and precision == "fp32"):
        return "onnxruntime"
    if precision == "fp32":
        raise EngineError(
            f"--backend {wanted} runs fp16 and fp8 engines, this one is fp32: use --backend "
            "onnxruntime, or an engine of `clipmill engine build`"
        )
    if machine.architecture is None:
        if wanted == "auto":
            return "onnxruntime"
        raise DeviceError(f"--backend {wanted} needs a GPU, and there is none: use --backend auto")
    number = int(re.sub(r"\D", "", machine.architecture))
    if precision == "fp8" and number < FIRST_FP8_ARCHITECTURE:
        raise DeviceError(
            f"this GPU ({machine.architecture}) has no FP8: use an fp16 engine (`clipmill engine "
            "build --precision fp16`), or --backend onnxruntime to run on the CPU"
        )
    if wanted != "torch" and machine.tensorrt_fault is None:
        return "tensorrt"
    if wanted != "tensorrt" and machine.has_torch:
        return "torch"
    faults = []
    if wanted != "torch":
        faults.append(f"TensorRT: {machine.tensorrt_fault}")
    if wanted != "tensorrt":
        faults.append("PyTorch: not installed, or not for CUDA")
    raise DeviceError(
        f"there is a GPU ({machine.architecture}), but nothing that can use it ({'; '.join(faults)}"
        "). Mend that, or use --backend onnxruntime to run on the CPU"
    )


def remark_on(backend: Backend, *, precision: Precision, machine: Machine) -> str | None:
    """What who left the choice open should know of it: why it is not the fastest backend."""
    if precision == "fp32" or backend == "tensorrt":
        return None
    if backend == "torch":
        return f"by PyTorch, since TensorRT can't be used: {machine.tensorrt_fault}"
    return "on the CPU, since there is no GPU"


def load_encoder(
    engine: Engine,
    *,
    backend: Backend,
    registry: Registry,
    num_threads: int,
    profile: PlanProfile = BULK,
) -> Encoder:
    """Load an engine; a plan that it lacks for this GPU is built first, once for all who ask.

    Args:
        engine: On this node.
        backend: As chosen.
        registry: Where the engine's plans are kept.
        num_threads: Of ONNX Runtime, on the CPU.
        profile: Rows at a time, on a GPU.

    Raises:
        EngineError, PlanError, DeviceError: See the backend's encoder.
    """
    if backend == "onnxruntime":
        from engine.backends.onnx_cpu import OnnxCpuEncoder

        return OnnxCpuEncoder(engine.directory, num_threads=num_threads)
    if backend == "torch":
        from engine.backends.torch_fp8 import TorchEncoder

        # In bulk it takes what suits the tower; a plan's sizes are built in.
        return TorchEncoder(
            engine.directory, max_rows=None if profile == BULK else profile.max_rows
        )
    from engine.backends.trt import TrtEncoder

    plan_dir = obtain_plan(engine, registry=registry, profile=profile)
    return TrtEncoder(engine.directory, plan_dir=plan_dir)
