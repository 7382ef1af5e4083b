"""The encode stage in one process: what it fills in, what it leaves null, which engine it takes."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from engine.build import engine_id_of
from engine.checkpoint import find_checkpoint
from engine.errors import CheckpointError, EngineError
from engine.registry import Registry
from pipelines.encode import EncodeStage, pixel_array, ready_engine
from pipelines.snapshots import EngineRecord
from tests.engines import flip_byte
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


def test_a_checkpoint_that_changed_is_not_taken_for_the_one_recorded(
    record: EngineRecord, tmp_path: Path
):
    changed = tmp_path / "changed"
    shutil.copytree(record.checkpoint, changed)
    config = changed / "config.json"
    config.write_text(config.read_text() + "\n")
    other = EngineRecord(engine_id=record.engine_id, checkpoint=str(changed), revision=None)
    with pytest.raises(EngineError, match=r"its files have changed or differ between machines"):
        ready_engine(other, registry=Registry(str(tmp_path / "engines")))


def test_neither_engine_nor_checkpoint_is_an_error(tmp_path: Path):
    gone = EngineRecord(engine_id="fp32-0", checkpoint=str(tmp_path / "gone"), revision=None)
    with pytest.raises(CheckpointError, match="no such folder"):
        ready_engine(gone, registry=Registry(str(tmp_path / "engines")))


def test_an_engine_that_takes_more_than_a_checkpoint_is_not_built_by_a_worker(
    record: EngineRecord, tmp_path: Path
):
    fp8 = EngineRecord(engine_id="fp8-0", checkpoint=record.checkpoint, revision=None)
    uri = str(tmp_path / "engines")
    with pytest.raises(EngineError) as caught:
        ready_engine(fp8, registry=Registry(uri))
    for part in ("fp8-0", uri, "every node reaches", "--engines", "`clipmill engine build`"):
        assert part in str(caught.value)


def test_a_damaged_engine_is_built_anew(record: EngineRecord, engines_dir: Path, tmp_path: Path):
    whole = ready_engine(record, registry=Registry(str(engines_dir)))
    shutil.copytree(whole.directory, tmp_path / record.engine_id)
    flip_byte(tmp_path / record.engine_id / "image.onnx")
    mended = ready_engine(record, registry=Registry(str(tmp_path)))
    assert mended.manifest == whole.manifest
    assert mended.directory == tmp_path / record.engine_id


def test_a_16_bit_engine_is_built_from_its_checkpoint(record: EngineRecord, tmp_path: Path):
    engine_id = engine_id_of(find_checkpoint(record.checkpoint), precision="fp16")
    fp16 = EngineRecord(engine_id=engine_id, checkpoint=record.checkpoint, revision=None)
    built = ready_engine(fp16, registry=Registry(str(tmp_path)))
    assert built.manifest.engine_id == engine_id
    assert built.manifest.precision == "fp16"
