"""Checks the GPUs of a machine, their driver and libraries, and which engines run on it.

Knows nothing of who asks.
"""

import importlib.util
import re
from pathlib import Path
from typing import get_args

from engine.backends.choice import (
    FIRST_FP8_ARCHITECTURE,
    Machine,
    choose_backend,
    this_machine,
)
from engine.decoding.nvjpeg import NvJpeg
from engine.device import Device, has_driver, open_device
from engine.errors import DeviceError, EngineError
from engine.manifest import Precision
from engine.plans.runtimes import INSTALL, installed_library
from jobs.checks.check import Check

GPU_EXTRA = "pip install 'clipmill[gpu]'"
BY_HAND = "see `nvidia-smi`; then check the NVIDIA driver, or the container's --gpus"
DRIVER_FILE = Path("/proc/driver/nvidia/version")
_DRIVER_VERSION = re.compile(r"\b\d{3}\.\d+(?:\.\d+)?\b")
GIB = 2**30


def gpu_checks() -> list[Check]:
    """All of this machine, from within a process that may use its GPUs."""
    try:
        machine = this_machine()
    except DeviceError as error:
        # No silent change of device: an engine for GPUs would not run here.
        found = f"there is a driver ({driver_version()}), but: {error}"
        mend = GPU_EXTRA if GPU_EXTRA in found else BY_HAND
        return [Check(name="gpu", verdict="wrong", found=found, mend=mend, is_needed=True)]
    if machine.architecture is None:
        unseen = " that this process may use, though there is a driver" if has_driver() else ""
        return [
            Check(name="gpu", verdict="ok", found=f"none{unseen}; engines run on CPUs"),
            tensorrt_check(machine),
            backends_check(machine),
        ]
    try:
        cards = cards_check(open_device())
    except DeviceError as error:
        cards = Check(name="gpu", verdict="missing", found=str(error), mend=GPU_EXTRA)
    return [cards, tensorrt_check(machine), backends_check(machine), nvjpeg_check()]


def cards_check(device: Device) -> Check:
    """The cards, and their driver."""
    cards = [
        f"{card.name} ({card.architecture}, {card.num_bytes / GIB:.0f} GiB)"
        for card in device.cards()
    ]
    free_bytes, _ = device.memory()
    return Check(
        name="gpu",
        verdict="ok",
        found=f"{', '.join(cards)}, of the first {free_bytes / GIB:.0f} GiB free; driver "
        f"{driver_version()}, for CUDA up to {device.driver_cuda()}",
    )


def driver_version(path: Path = DRIVER_FILE) -> str:
    """Of the NVIDIA driver, as its kernel module says; in words if it does not."""
    try:
        found = _DRIVER_VERSION.search(path.read_text())
    except OSError:
        found = None
    return found.group() if found else "of unknown version"


def tensorrt_check(machine: Machine) -> Check:
    """TensorRT, or TensorRT for RTX."""
    try:
        library = installed_library()
    except DeviceError as error:
        if machine.architecture is None:
            return Check(name="tensorrt", verdict="ok", found="none, and none is needed on CPUs")
        return Check(
            name="tensorrt",
            verdict="missing" if str(error).startswith("no TensorRT") else "wrong",
            found=str(error),
            mend=GPU_EXTRA,
        )
    found = f"{library.flavour} {library.version}"
    if machine.architecture is None:
        of_others = library.flavour == "tensorrt_rtx"
        compiles = "compiles plans for other machines (`engine build --plans-for`)"
        return Check(
            name="tensorrt",
            verdict="ok",
            found=f"{found}, which {compiles if of_others else 'has no GPU to run on'}",
        )
    if machine.tensorrt_fault is None:
        return Check(name="tensorrt", verdict="ok", found=found)
    other = "tensorrt" if library.flavour == "tensorrt_rtx" else "tensorrt_rtx"
    return Check(
        name="tensorrt",
        verdict="wrong",
        found=f"{found}: {machine.tensorrt_fault}",
        mend=INSTALL["tensorrt"] if other == "tensorrt" else f"{GPU_EXTRA} --upgrade",
    )


def backends_check(machine: Machine) -> Check:
    """What would execute an engine of each precision; `--backend auto`."""
    runs, faults = [], {}
    for precision in get_args(Precision):
        try:
            backend = choose_backend("auto", precision=precision, machine=machine)
        except EngineError as error:
            faults[precision] = str(error)
        else:
            runs.append(f"{precision} by {backend}")
    if not faults:
        return Check(name="backends", verdict="ok", found=", ".join(runs), is_needed=True)
    found = f"{', '.join(runs)}; but {'; '.join(dict.fromkeys(faults.values()))}"
    if faults.keys() == {"fp8"}:
        found += f" (FP8 begins with sm_{FIRST_FP8_ARCHITECTURE})"
    return Check(
        name="backends",
        verdict="wrong",
        found=found,
        mend=GPU_EXTRA if "fp16" in faults else "clipmill engine build --precision fp16 ...",
        is_needed="fp16" in faults,  # which every card runs
    )


def nvjpeg_check() -> Check:
    """Whether the card can decode JPEGs; CPUs do it where it can't."""
    absent = [name for name in ("torch", "triton") if importlib.util.find_spec(name) is None]
    try:
        if absent:
            raise DeviceError(f"{' and '.join(absent)} missing, whose kernels resize images there")
        NvJpeg().close()
    except DeviceError as error:
        return Check(
            name="nvjpeg", verdict="missing", found=f"{error}; CPUs decode", mend=GPU_EXTRA
        )
    return Check(name="nvjpeg", verdict="ok", found="decodes JPEGs on the GPU (--decode gpu)")
