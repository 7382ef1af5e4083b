"""Compiles Triton kernels for cards that are not here.

Triton's interpreter is more lenient, and its process cannot compile, so that `compiled` runs a
program in another, where a `CompiledKernel` stands for each kernel.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import torch

_TYPES = {int: "i32", float: "fp32", torch.float16: "*fp16", torch.float8_e4m3fn: "*fp8e4nv"}
_OPTIONS = ("num_warps", "num_stages")


class CompiledKernel:
    """In place of a kernel: compiles what would be launched, and prints its shared memory."""

    capability: ClassVar[int] = 90
    """Of the card: 90 is Hopper."""

    def __init__(self, kernel: Any) -> None:
        """Take the place of `kernel`."""
        self._kernel = kernel

    def __getitem__(self, grid: object) -> Any:
        """As a kernel is launched."""
        return self._compile

    def _compile(self, *values: Any, **constants: Any) -> None:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        names = self._kernel.arg_names
        options = {name: constants.pop(name) for name in _OPTIONS if name in constants}
        constants |= {
            name: value for name, value in zip(names, values, strict=False) if value is None
        }
        signature = {
            name: _TYPES[getattr(value, "dtype", type(value))]
            for name, value in zip(names, values, strict=False)
            if value is not None
        }
        signature |= dict.fromkeys(constants, "constexpr")
        source = ASTSource(self._kernel, {name: signature[name] for name in names}, constants)
        target = GPUTarget("cuda", self.capability, 32)
        found = triton.compile(source, target=target, options=options)
        sys.stdout.write(f"{self._kernel.__name__} {found.metadata.shared}\n")


def compiled(program: str, *, cache_dir: Path) -> list[str]:
    """Run a program outside the interpreter; the lines that it printed."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).resolve().parents[1],
        env=environment | {"TRITON_CACHE_DIR": str(cache_dir)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()
