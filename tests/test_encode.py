"""The encode stage in one process: what it fills in, what it leaves null, which engine it takes."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from engine.backends.encoder import Encoder
from engine.build import engine_id_of
from engine.checkpoint import find_checkpoint
from engine.registry import Registry
from pipelines.encode import EncodeStage, pixel_array
from pipelines.engines import ready_engine
from pipelines.snapshots import EngineRecord
from tests.meters import ListMeter

SHAPE = (2, 2, 3)


def test_pixels_of_a_column_with_nulls_and_an_offset_come_without_a_copy():
    pictures = [np.full(SHAPE, value, np.uint8) for value in (1, 2, 3)]
    column = pa.chunked_array(
        [
            pa.array(
                [b"x" * 12, *(part for picture in pictures for part in (picture.tobytes(), None))],
                pa.large_binary(),
            )
        ]
    ).slice(1)
    found = pixel_array(column, shape=SHAPE)
    assert np.array_equal(found, np.stack(pictures))
    address = column.chunk(0).buffers()[2].address
    assert found.__array_interface__["data"][0] == address + 12


@pytest.fixture(scope="module")
def record(checkpoint_dir: Path) -> EngineRecord:
    engine_id = engine_id_of(find_checkpoint(str(checkpoint_dir)))
    return EngineRecord(engine_id=engine_id, checkpoint=str(checkpoint_dir), revision=None)


def test_rows_that_are_fine_get_unit_embeddings_and_rejects_get_none(
    record: EngineRecord, engines_dir: Path
):
    meter = ListMeter()
    stage = EncodeStage(
        engine=record,
        registry=Registry(str(engines_dir)),
        backend="onnxruntime",
        num_threads=1,
        dtype="float16",
        meter=meter,
    )
    side = ready_engine(record, registry=Registry(str(engines_dir))).manifest.preprocessing.height
    picture = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8).tobytes()
    table = pa.table(
        {
            "key": ["picture", "caption", "reject", "twin"],
            "pixels": pa.array([picture, None, None, picture], pa.large_binary()),
            "text": [None, "a small red circle", None, None],
            "reason": [None, None, "not_an_image", None],
        }
    )
    encoded = stage(table)
    assert encoded.column_names == ["key", "reason", "embedding"]
    assert encoded["embedding"].type.value_type == pa.float16()
    vectors = encoded["embedding"].to_pylist()
    assert vectors[2] is None
    assert vectors[0] == vectors[3] != vectors[1]
    for row in (0, 1):
        assert np.linalg.norm(np.asarray(vectors[row], np.float32)) == pytest.approx(1, abs=1e-3)
    assert meter.batches == [(4, 0)]


class Overflowing:
    """An `Encoder` whose every second text is beyond what it can hold."""

    def __init__(self, encoder: Encoder) -> None:
        self.manifest = encoder.manifest

    def encode_texts(self, texts):
        embeddings = np.zeros((len(texts), self.manifest.embedding_dim), np.float32)
        embeddings[:, 0] = 1
        embeddings[1::2] = np.nan
        return embeddings


def test_a_row_without_an_embedding_is_a_reject_and_the_others_are_not(
    record: EngineRecord, engines_dir: Path
):
    stage = EncodeStage(
        engine=record,
        registry=Registry(str(engines_dir)),
        backend="onnxruntime",
        num_threads=1,
        dtype="float32",
        meter=ListMeter(),
    )
    stage._encoder = Overflowing(stage._encoder)
    table = pa.table(
        {
            "key": [1, 2, 3],
            "pixels": pa.nulls(3, pa.large_binary()),
            "text": ["a", "b", None],
            "stage": [None, None, "decode"],
            "reason": [None, None, "null_text"],
            "detail": [None, None, "there is none"],
        }
    )
    encoded = stage(table)
    assert encoded["embedding"].is_valid().to_pylist() == [True, False, False]
    assert encoded["stage"].to_pylist() == [None, "encode", "decode"]
    assert encoded["reason"].to_pylist() == [None, "not_encodable", "null_text"]
    assert encoded["detail"].to_pylist()[1:] == [
        "the engine gives no unit vector for it; is it beyond 16 bit?",
        "there is none",
    ]
