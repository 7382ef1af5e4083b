"""Stages of a run that end their worker when they see certain rows; workers import them."""

import os
import signal
import time
from typing import Any

import pyarrow as pa

from pipelines.decode import decode_batch
from pipelines.encode import EncodeStage
from pipelines.resilience.survival import EncodeActor
from tests.deadly import act_on

SLOW_SECONDS = 4.0
# Until a row that kills has killed: what is beside it has begun by then.
DEATH_SECONDS = 0.5
VECTOR_TYPE = pa.list_(pa.float32(), 2)


class DeadlyEncodeStage(EncodeStage):
    """Dies of texts."""

    def __call__(self, table: pa.Table) -> pa.Table:
        act_on(table["text"].to_pylist())
        return super().__call__(table)


class DeadEncodeStage(EncodeStage):
    """Dies before it is there."""

    def __init__(self, **options: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class BrokenEncodeStage(EncodeStage):
    """Loads, and dies of whatever it is given."""

    def __call__(self, table: pa.Table) -> pa.Table:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


class LightStage:
    """As `EncodeStage`, with vectors that take no engine.

    Dies of `die PATH`, of which it leaves a note, and takes its time for `slow`.
    """

    def __init__(self, *, meter: Any, decode_meter: Any) -> None:
        pass

    def check(self) -> None:
        pass

    def __call__(self, table: pa.Table) -> pa.Table:
        for text in table["text"].to_pylist():
            word, _, path = (text or "").partition(" ")
            if word == "die":
                time.sleep(DEATH_SECONDS)
                with open(path, "a") as deaths:
                    deaths.write(f"{os.getpid()}\n")
                act_on([word])
            elif word == "slow":
                time.sleep(SLOW_SECONDS)
        vectors = pa.array([[1.0, 0.0]] * table.num_rows, VECTOR_TYPE)
        rest = table.drop_columns(["pixels", "encoded", "geometry", "text"])
        return rest.append_column("embedding", vectors)


class LightActor(EncodeActor):
    """An actor of such stages, with methods of a name."""

    def encode(self, table: pa.Table) -> pa.Table:
        return self(table)

    def pid(self) -> int:
        return os.getpid()


def deadly_decode_batch(table: pa.Table, **options: Any) -> pa.Table:
    """Dies of images."""
    for image in table["image"].filter(table["image_wanted"]).to_pylist():
        if image is not None and len(image) < 100:
            act_on([image.decode()])
    return decode_batch(table, **options)
