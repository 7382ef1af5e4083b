"""The encode stage in one process: what it fills in, what it leaves null, which engine it takes."""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch

from engine.backends.choice import load_encoder
from engine.backends.encoder import Encoder
from engine.build import engine_id_of
from engine.checkpoint import find_checkpoint
from engine.errors import DeviceLostError
from engine.images import ImageLimits, ImageRejected
from engine.preprocess import decode_pixels
from engine.registry import Registry
from pipelines.encode import EncodeStage, embedding_type, unencodable
from pipelines.engines import ready_engine
from pipelines.schema import GEOMETRY_TYPE, EmbeddingDtype
from pipelines.snapshots import EngineRecord
from tests import image_files
from tests.meters import ListMeter


@pytest.fixture(scope="module")
def record(checkpoint_dir: Path) -> EngineRecord:
    engine_id = engine_id_of(find_checkpoint(str(checkpoint_dir)))
    return EngineRecord(engine_id=engine_id, checkpoint=str(checkpoint_dir), revision=None)


def make_stage(
    record: EngineRecord,
    engines_dir: Path,
    *,
    dtype: EmbeddingDtype = "float32",
    meter: ListMeter | None = None,
    decode_meter: ListMeter | None = None,
) -> EncodeStage:
    return EncodeStage(
        engine=record,
        registry=Registry(str(engines_dir)),
        backend="onnxruntime",
        decoder="cpu",
        limits=ImageLimits(),
        num_threads=1,
        dtype=dtype,
        meter=meter or ListMeter(),
        decode_meter=decode_meter or ListMeter(),
    )


def encoded_columns(images: Sequence[bytes | None]) -> dict[str, pa.Array]:
    """As the decode stage passes images on; their sizes differ."""
    geometries = [image and (70 + row, 60, 1) for row, image in enumerate(images)]
    return {
        "encoded": pa.array(images, pa.large_binary()),
        "geometry": pa.array(geometries, GEOMETRY_TYPE),
    }


def test_rows_that_are_fine_get_unit_embeddings_and_rejects_get_none(
    record: EngineRecord, engines_dir: Path
):
    meter = ListMeter()
    stage = make_stage(record, engines_dir, dtype="float16", meter=meter)
    side = ready_engine(record, registry=Registry(str(engines_dir))).manifest.preprocessing.height
    picture = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8).tobytes()
    table = pa.table(
        {
            "key": ["picture", "caption", "reject", "twin"],
            "pixels": pa.array([picture, None, None, picture], pa.large_binary()),
            **encoded_columns([None] * 4),
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


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_rows_that_cannot_be_encoded_without_harm_are_rejects_like_others(
    record: EngineRecord, engines_dir: Path, dtype: EmbeddingDtype
):
    stage = make_stage(record, engines_dir, dtype=dtype)
    table = pa.table(
        {
            "key": ["a", "b", "c"],
            "pixels": pa.nulls(3, pa.large_binary()),
            **encoded_columns([None] * 3),
            "text": ["a circle", "a square", "a star"],
            "stage": pa.nulls(3, pa.string()),
            "reason": pa.nulls(3, pa.string()),
            "detail": pa.nulls(3, pa.string()),
        }
    )
    type_ = embedding_type(embedding_dim=stage._encoder.manifest.embedding_dim, dtype=dtype)
    rejects = unencodable(table, {2: "was killed by SIGSEGV", 0: "ended with 7"}, type_=type_)
    assert rejects.schema == stage(table).schema
    assert rejects.drop_columns("embedding").to_pylist() == [
        {"key": key, "stage": "encode", "reason": "poison", "detail": detail}
        for key, detail in (
            ("c", "a process that encoded it alone was killed by SIGSEGV"),
            ("a", "a process that encoded it alone ended with 7"),
        )
    ]
    assert rejects["embedding"].null_count == 2


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
    stage = make_stage(record, engines_dir)
    stage._encoder = Overflowing(stage._encoder)
    table = pa.table(
        {
            "key": [1, 2, 3],
            "pixels": pa.nulls(3, pa.large_binary()),
            **encoded_columns([None] * 3),
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


class ByPillow:
    """Decodes as `GpuDecoder` does, without a GPU."""

    def __init__(self, preprocessing) -> None:
        self.preprocessing = preprocessing

    def decode(self, jpegs, *, beside=None):
        pixels, rejected = {}, {}
        assert jpegs.geometries.shape == (len(jpegs), 3)
        assert jpegs.geometries.dtype == np.int64  # bytes of large images are beyond 32 bit
        self.geometries = jpegs.geometries.tolist()
        for row, content in enumerate(map(jpegs.image, range(len(jpegs)))):
            try:
                pixels[row] = decode_pixels(
                    content, preprocessing=self.preprocessing, limits=ImageLimits()
                )
            except ImageRejected as verdict:
                rejected[row] = verdict
        shape = (len(pixels), self.preprocessing.height, self.preprocessing.width, 3)
        decoded = np.array(list(pixels.values()), np.uint8).reshape(shape)
        return SimpleNamespace(
            rows=np.array(list(pixels), dtype=np.int64),
            pixels=torch.from_numpy(decoded if beside is None else np.r_[decoded, beside]),
            rejected=rejected,
            card_seconds=0.25,
        )


def test_what_comes_encoded_is_decoded_here_and_what_cannot_be_is_a_reject_of_decoding(
    record: EngineRecord, engines_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    meter, decode_meter = ListMeter(), ListMeter()
    stage = make_stage(record, engines_dir, meter=meter, decode_meter=decode_meter)
    preprocessing = stage._encoder.manifest.preprocessing
    stage._decoder = ByPillow(preprocessing)
    photos = [image_files.jpeg(image_files.photo(90, 70, seed=seed)) for seed in range(3)]
    pixels = [
        decode_pixels(photo, preprocessing=preprocessing, limits=ImageLimits()).tobytes()
        for photo in photos
    ]
    head = {"key": list("abcde"), "text": [None, None, None, "a word", None]}
    verdicts = {name: pa.nulls(5, pa.string()) for name in ("stage", "reason", "detail")}
    damaged = photos[1][: len(photos[1]) // 2]
    table = pa.table(
        {
            **head,
            **verdicts,
            "pixels": pa.array([None, pixels[1], None, None, None], pa.large_binary()),
            **encoded_columns([photos[0], None, damaged, None, photos[2]]),
        }
    )
    calls = []
    encode_images = stage._encoder.encode_images
    monkeypatch.setattr(
        stage._encoder, "encode_images", lambda x: calls.append(len(x)) or encode_images(x)
    )
    encoded = stage(table)
    assert calls == [3]  # those of both kinds are one batch
    assert encoded.column_names == ["key", "stage", "reason", "detail", "embedding"]
    assert stage._decoder.geometries == [[70, 60, 1], [72, 60, 1], [74, 60, 1]]
    assert encoded["reason"].to_pylist() == [None, None, "truncated_image", None, None]
    assert encoded["stage"].to_pylist() == [None, None, "decode", None, None]
    assert encoded["embedding"].is_valid().to_pylist() == [True, True, False, True, True]
    by_cpu = stage(
        pa.table(
            {
                **head,
                **verdicts,
                "pixels": pa.array([*pixels[:2], None, None, pixels[2]], pa.large_binary()),
                **encoded_columns([None] * 5),
            }
        )
    )
    expected = [row for row in by_cpu["embedding"].to_pylist() if row]
    found = [row for row in encoded["embedding"].to_pylist() if row]
    assert np.allclose(found, expected, atol=1e-6)
    assert decode_meter.batches == [(3, 2 * len(pixels[0]))]
    assert [rows for rows, _ in meter.batches] == [5, 5]


def test_what_is_decoded_and_then_not_encoded_is_not_counted(
    record: EngineRecord, engines_dir: Path
):
    """It comes again, and would count twice."""
    decode_meter = ListMeter()
    stage = make_stage(record, engines_dir, decode_meter=decode_meter)
    stage._decoder = ByPillow(stage._encoder.manifest.preprocessing)
    encoder, stage._encoder = stage._encoder, Failing(stage._encoder)
    table = encoded_rows([image_files.jpeg(image_files.photo(70, 60))], keys=[1])
    with pytest.raises(DeviceLostError):
        stage(table)
    assert decode_meter.batches == []
    stage._encoder = encoder
    stage(table)
    assert [rows for rows, _ in decode_meter.batches] == [1]


class Failing:
    """An `Encoder` whose GPU is lost."""

    def __init__(self, encoder: Encoder) -> None:
        self.manifest = encoder.manifest

    def encode_images(self, pixels):
        raise DeviceLostError("no such address on this card")


def stage_by_pillow(record: EngineRecord, engines_dir: Path) -> EncodeStage:
    stage = make_stage(record, engines_dir)
    stage._decoder = ByPillow(stage._encoder.manifest.preprocessing)
    return stage


def encoded_rows(images: list[bytes], *, keys: list[int]) -> pa.Table:
    return pa.table(
        {
            "key": keys,
            **{name: pa.nulls(len(keys), pa.string()) for name in ("text", "stage", "reason")},
            "detail": pa.nulls(len(keys), pa.string()),
            "pixels": pa.nulls(len(keys), pa.large_binary()),
            **encoded_columns(images),
        }
    )


@pytest.mark.parametrize("num_rows", [0, 3])
def test_a_batch_of_which_no_image_is_left(record: EngineRecord, engines_dir: Path, num_rows: int):
    stage = stage_by_pillow(record, engines_dir)
    found = stage(encoded_rows([b"no image"] * num_rows, keys=list(range(num_rows))))
    assert found["reason"].to_pylist() == ["not_an_image"] * num_rows
    assert found["embedding"].to_pylist() == [None] * num_rows


class Counting:
    """Passes images on, slowly, and remembers how many calls were under way at once."""

    def __init__(self, inner, *, max_calls: int) -> None:
        self._inner, self.max_calls = inner, max_calls
        self._lock, self._inner_lock = threading.Lock(), threading.Lock()
        self._num_calls = self.most_calls = 0

    def __getattr__(self, name: str):
        return getattr(self._inner, name)

    def encode_images(self, pixels):
        with self._lock:
            self._num_calls += 1
            self.most_calls = max(self.most_calls, self._num_calls)
        time.sleep(0.1)
        with self._inner_lock:  # it takes one call at a time
            embeddings = self._inner.encode_images(pixels)
        with self._lock:
            self._num_calls -= 1
        return embeddings


@pytest.mark.parametrize("max_calls", [1, 2])
def test_batches_in_several_threads_keep_their_rows_and_take_turns(
    record: EngineRecord, engines_dir: Path, monkeypatch: pytest.MonkeyPatch, max_calls: int
):
    def load(*args, **options):
        return Counting(load_encoder(*args, **options), max_calls=max_calls)

    monkeypatch.setattr("pipelines.encode.load_encoder", load)
    stage = stage_by_pillow(record, engines_dir)
    photos = [image_files.jpeg(image_files.photo(70, 60, seed=seed)) for seed in range(24)]
    batches = [
        encoded_rows(photos[first : first + 3], keys=list(range(first, first + 3)))
        for first in range(0, 24, 3)
    ]
    alone = [stage(batch)["embedding"].to_pylist() for batch in batches]
    with ThreadPoolExecutor(3) as threads:
        together = list(threads.map(stage, batches))
    assert [table["key"].to_pylist() for table in together] == [
        table["key"].to_pylist() for table in batches
    ]
    assert [table["embedding"].to_pylist() for table in together] == alone
    assert stage._encoder.most_calls == max_calls
