"""Stages of a run that end their worker when they see certain rows; workers import them."""

import os
import signal
from typing import Any

import pyarrow as pa

from pipelines.decode import decode_batch
from pipelines.encode import EncodeStage
from tests.deadly import act_on


class DeadlyEncodeStage(EncodeStage):
    """Dies of texts."""

    def __call__(self, table: pa.Table) -> pa.Table:
        act_on(table["text"].to_pylist())
        return super().__call__(table)


class DeadEncodeStage(EncodeStage):
    """Dies before it is there."""

    def __init__(self, **options: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def deadly_decode_batch(table: pa.Table, **options: Any) -> pa.Table:
    """Dies of images."""
    for image in table["image"].filter(table["image_wanted"]).to_pylist():
        if image is not None and len(image) < 100:
            act_on([image.decode()])
    return decode_batch(table, **options)
