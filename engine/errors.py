"""The exceptions that Clipmill raises for what it cannot do, each with the way out in its text.

Knows nothing of where they are raised.

    ClipmillError
    ├── CheckpointError      a checkpoint is missing, malformed or of a family that is not supported
    ├── EngineError          an engine is missing, damaged, or cannot be built or run here
    │   ├── DamagedError         files of an engine or plan are missing or fail their checksums
    │   ├── QuantizationError    the sample or a layer does not allow FP8
    │   ├── GateError            an engine may not be promoted or used: its gate failed or never ran
    │   ├── PlanError            a plan cannot be built, is damaged, or fits another card or version
    │   └── DeviceError          the GPU is missing, or a call to it failed
    │       ├── DeviceMemoryError    the GPU has too little free memory
    │       ├── DeviceLostError      a call failed so that this process can't use the GPU any more
    │       └── NoGpuError           there is no GPU
    └── PipelineError        see pipelines/errors.py

A value that a caller could have checked (an option out of bounds) is a plain ValueError.
"""

from engine.redaction import redacted


class ClipmillError(Exception):
    """Base of all errors whose text is meant for the person who runs Clipmill."""

    def __init__(self, *parts: object) -> None:
        """Leave out credentials: the text may be printed, logged, stored or sent to a client."""
        super().__init__(*(redacted(part) if isinstance(part, str) else part for part in parts))


class CheckpointError(ClipmillError):
    """A checkpoint is missing, malformed or of a family that is not supported."""


class EngineError(ClipmillError):
    """An engine is missing, damaged, or cannot be built or run here."""


class DamagedError(EngineError):
    """Files of an engine or a plan are missing, or do not match their checksums."""


class QuantizationError(EngineError):
    """The calibration sample or a layer does not allow FP8."""


class GateError(EngineError):
    """An engine may not be promoted or used: its gate failed or never ran."""


class PlanError(EngineError):
    """A plan cannot be built, is damaged, or was built for another card or version."""


class DeviceError(EngineError):
    """The GPU is missing or not able, or a call to it failed."""


class DeviceMemoryError(DeviceError):
    """The GPU has too little free memory."""


class DeviceLostError(DeviceError):
    """A call to the GPU failed, after which this process cannot use it any more."""


class NoGpuError(DeviceError):
    """There is no GPU."""
