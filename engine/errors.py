"""The exceptions that Clipmill raises for what it cannot do, each with the way out in its text.

Knows nothing of where they are raised.

    ClipmillError
    ├── CheckpointError      a checkpoint is missing, malformed or of a family that is not supported
    ├── EngineError          an engine is missing, damaged, or cannot be built or run here
    └── PipelineError        see pipelines/errors.py

A value that a caller could have checked (an option out of bounds) is a plain ValueError.
"""


class ClipmillError(Exception):
    """Base of all errors whose text is meant for the person who runs Clipmill."""


class CheckpointError(ClipmillError):
    """A checkpoint is missing, malformed or of a family that is not supported."""


class EngineError(ClipmillError):
    """An engine is missing, damaged, or cannot be built or run here."""
