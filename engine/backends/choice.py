"""Which backend runs an engine on a machine: chosen once, in the open; and how it is loaded.

Knows nothing of what is encoded, and imports no backend before it is wanted.
"""

import importlib.util
import re
from dataclasses import dataclass
from typing import Literal, get_args

from engine.backends.encoder import Encoder
from engine.device import open_device
from engine.errors import DeviceError, EngineError, PlanError
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
    tensorrt: str | None
    """The TensorRT that builds and runs plans there, with its version; None if there is none."""
    has_torch: bool
    """Whether PyTorch can use the GPU."""


def this_machine() -> Machine:
    """Look at the GPU and the libraries of this process."""
    try:
        architecture = open_device().architecture
    except DeviceError:
        return Machine(architecture=None, tensorrt=None, has_torch=False)
    tensorrt = None
    try:
        key = plan_key(PlanConfig())
        tensorrt = f"{key.flavour} {key.version}"
    except (DeviceError, PlanError):
        pass  # not installed, or not for this card: `choose_backend` says so where it matters
    has_torch = False
    if importlib.util.find_spec("torch") is not None:
        import torch

        has_torch = torch.cuda.is_available()
    return Machine(architecture=architecture, tensorrt=tensorrt, has_torch=has_torch)


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
    if wanted != "torch" and machine.tensorrt is not None:
        return "tensorrt"
    if wanted != "tensorrt" and machine.has_torch:
        return "torch"
    missing = {"tensorrt": "no TensorRT", "torch": "no PyTorch for CUDA"}.get(
        wanted, "neither TensorRT nor PyTorch for CUDA"
    )
    raise DeviceError(
        f"there is a GPU ({machine.architecture}), but {missing} that can use it: pip install "
        "'clipmill[gpu]', or --backend onnxruntime to run on the CPU"
    )


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

        return TorchEncoder(engine.directory, max_rows=profile.max_rows)
    from engine.backends.trt import TrtEncoder

    plan_dir = obtain_plan(engine, registry=registry, profile=profile)
    return TrtEncoder(engine.directory, plan_dir=plan_dir)
