"""TensorRT's measurements of kernels, kept from build to build.

Knows nothing of what is built.

A cache makes the next build faster, not the same: kernels of like speed may be chosen anew each
time, so that two builds of one graph give other bytes, and other last bits. TensorRT for RTX has
no such cache.
"""

import os
import tempfile
from pathlib import Path
from typing import Any

from engine.errors import PlanError
from engine.plans.plan import PlanKey


class TimingCache:
    """One file for each library, version and architecture, which any number of builds share."""

    def __init__(self, directory: Path, key: PlanKey) -> None:
        """Name the file; PlanError if its folder cannot be made."""
        self._path = directory / f"{key.flavour}-{key.version}-{key.architecture}.timing"
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unusable(error) from error

    def attach(self, config: Any) -> None:
        """Give an `IBuilderConfig` what is known; a file that TensorRT refuses counts as none."""
        try:
            known = self._path.read_bytes() if self._path.exists() else b""
        except OSError as error:
            raise self._unusable(error) from error
        cache = config.create_timing_cache(known)
        if cache is None or not config.set_timing_cache(cache, False):
            config.set_timing_cache(config.create_timing_cache(b""), False)

    def publish(self, config: Any) -> None:
        """Replace the file as a whole by what a build knows now; the last of several stays."""
        try:
            handle, temporary = tempfile.mkstemp(
                prefix=f".{self._path.name}.", dir=self._path.parent
            )
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(memoryview(config.get_timing_cache().serialize()))
                os.chmod(temporary, 0o644)  # mkstemp makes it private
                os.replace(temporary, self._path)
            except OSError:
                os.unlink(temporary)
                raise
        except OSError as error:
            raise self._unusable(error) from error

    def _unusable(self, error: OSError) -> PlanError:
        return PlanError(
            f"timing cache {self._path} cannot be kept ({error.strerror}); free space, or name a "
            "folder that can be written"
        )
