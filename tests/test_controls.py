"""Control rows: the stages take them as any others, and find nothing wrong with them."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from engine.build import engine_id_of
from engine.checkpoint import find_checkpoint
from engine.images import ImageLimits, rgb_image
from engine.preprocess import Preprocessing
from engine.registry import Registry
from pipelines.decode import RowLimits, decode_batch
from pipelines.encode import EncodeStage
from pipelines.resilience.controls import TEXT, rows_to_decode, rows_to_encode
from pipelines.schema import GEOMETRY_TYPE
from pipelines.snapshots import EngineRecord
from tests.meters import ListMeter

PREPROCESSING = Preprocessing(
    height=8, width=16, resize=8, crop=(8, 16), resample=3, mean=(0, 0, 0), std=(1, 1, 1)
)
CANONICAL = pa.schema(
    {
        "key": pa.int64(),
        "version": pa.string(),
        "image": pa.large_binary(),
        "image_uri": pa.binary(),
        "text": pa.binary(),
        "source_file": pa.string(),
        "source_row": pa.int64(),
        "image_wanted": pa.bool_(),
        "text_wanted": pa.bool_(),
        "brand": pa.dictionary(pa.int32(), pa.string()),
        "tags": pa.list_(pa.struct({"name": pa.string()})),
    }
)
DECODED = pa.schema(
    {
        "key": pa.string(),
        "modality": pa.string(),
        "pixels": pa.large_binary(),
        "encoded": pa.large_binary(),
        "geometry": GEOMETRY_TYPE,
        "text": pa.string(),
        "stage": pa.string(),
        "reason": pa.string(),
        "detail": pa.string(),
        "price": pa.float64(),
    }
)


@pytest.mark.parametrize("columns", [CANONICAL.names, ["key", "text", "text_wanted"]])
@pytest.mark.parametrize("decoder", ["cpu", "gpu"])
def test_what_is_to_be_decoded_is_found_fine(columns: list[str], decoder):
    names = {"source_file", "source_row", *columns}
    like = pa.schema([field for field in CANONICAL if field.name in names])
    rows = rows_to_decode(like)
    assert (rows.schema, rows.num_rows) == (like, 1)
    modalities = [name for name in ("image", "text") if name in like.names]
    decoded = decode_batch(
        rows,
        modalities=modalities,
        preprocessing=PREPROCESSING,
        limits=RowLimits(),
        carry_columns=[name for name in ("brand", "tags") if name in like.names],
        decoder=decoder,
    )
    assert decoded["modality"].to_pylist() == modalities
    assert decoded["reason"].to_pylist() == [None] * len(modalities)
    assert decoded["text"].to_pylist()[-1] == TEXT
    # It is one for a card, where cards decode.
    assert decoded["encoded"].null_count == len(modalities) - (
        decoder == "gpu" and "image" in names
    )


@pytest.mark.parametrize(
    ("modalities", "decoder", "kinds"),
    [
        (("image", "text"), "cpu", ["pixels", "text"]),
        (("image", "text"), "gpu", ["pixels", "encoded", "text"]),
        (("image",), "gpu", ["pixels", "encoded"]),
        (("text",), "cpu", ["text"]),
    ],
)
def test_what_is_to_be_encoded_is_one_row_of_each_kind(modalities, decoder, kinds: list[str]):
    rows = rows_to_encode(
        DECODED, modalities=modalities, preprocessing=PREPROCESSING, decoder=decoder
    )
    assert rows.schema == DECODED
    found = [
        [name for name in ("pixels", "encoded", "text") if row[name] is not None]
        for row in rows.to_pylist()
    ]
    assert found == [[kind] for kind in kinds]
    for row in rows.to_pylist():
        assert row["pixels"] is None or len(row["pixels"]) == 8 * 16 * 3
        assert (row["geometry"] is None) == (row["encoded"] is None)
        if row["encoded"] is not None:
            image = rgb_image(row["encoded"], limits=ImageLimits())
            assert row["geometry"] == [*image.size, 1]
            assert len(np.unique(np.asarray(image))) > 100  # more than one colour


def test_an_engine_encodes_them(checkpoint_dir: Path, engines_dir: Path):
    engine_id = engine_id_of(find_checkpoint(str(checkpoint_dir)))
    stage = EncodeStage(
        engine=EngineRecord(engine_id=engine_id, checkpoint=str(checkpoint_dir), revision=None),
        registry=Registry(str(engines_dir)),
        backend="onnxruntime",
        decoder="cpu",
        limits=ImageLimits(),
        num_threads=1,
        dtype="float32",
        meter=ListMeter(),
        decode_meter=ListMeter(),
    )
    rows = rows_to_encode(
        DECODED,
        modalities=("image", "text"),
        preprocessing=stage._encoder.manifest.preprocessing,
        decoder="cpu",
    )
    encoded = stage(rows)
    assert encoded["embedding"].null_count == encoded["stage"].null_count - 2 == 0
