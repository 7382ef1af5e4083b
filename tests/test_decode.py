"""Tests of pipelines/decode.py."""

import io
import tracemalloc
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from engine.images import ImageLimits
from engine.preprocess import Preprocessing, decode_pixels
from pipelines import decode
from pipelines.decode import RowLimits, decode_batch, undecodable
from pipelines.fetching import fetch
from pipelines.fetching.fetch_policy import FetchPolicy
from pipelines.fingerprints import row_fingerprints
from pipelines.schema import GEOMETRY_TYPE, REASONS, Reason
from tests import image_files
from tests.meters import ListMeter

PREPROCESSING = Preprocessing(
    height=8,
    width=8,
    resize=8,
    crop=(8, 8),
    resample=3,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)
RED = np.full((8, 8, 3), image_files.RED, dtype=np.uint8)
LIMITS = RowLimits(
    image=ImageLimits(max_image_bytes=100_000),
    fetch=FetchPolicy(allow=("file:",)),
    max_text_chars=10,
)
# A file of its type's first bytes, which is enough to see that it is not supported.
PDF = b"%PDF-1.7\n"

BAD_IMAGES = {
    "null_image": (None, None),
    "fetch_failed": (None, "file:///nowhere/image.jpg"),
    "fetch_refused": (None, "http://127.0.0.1/image.jpg"),
    "empty_image": (b"", None),
    "not_an_image": (image_files.text_file(), None),
    "truncated_image": (image_files.truncated_jpeg(), None),
    "image_too_large": (image_files.png() + bytes(100_000), None),
    "unsupported_image": (PDF, None),
}
BAD_TEXTS = {"null_text": None, "empty_text": " \n\t\u3000", "text_too_long": "x" * 11}
BAD_TEXTS["invalid_text"] = b"caf\xe9"
OF_WHOLE_ROWS = {Reason.NULL_KEY.value, Reason.DUPLICATE_KEY.value}  # found before decoding


def image_rows(*contents, **columns):
    """Rows of (bytes, uri), all of them wanted."""
    num_rows = len(contents)
    return pa.table(
        {
            "key": [f"k{row}" for row in range(num_rows)],
            "image": pa.array([encoded for encoded, _ in contents], pa.large_binary()),
            "image_uri": pa.array([uri for _, uri in contents], pa.binary()),
            "source_file": ["a.parquet"] * num_rows,
            "source_row": pa.array(range(10, 10 + num_rows), pa.int64()),
            "image_wanted": [True] * num_rows,
            **columns,
        }
    )


def text_rows(*texts, **columns):
    num_rows = len(texts)
    return pa.table(
        {
            "key": [f"k{row}" for row in range(num_rows)],
            "text": pa.array(texts, pa.binary()),
            "source_file": ["a.parquet"] * num_rows,
            "source_row": pa.array(range(10, 10 + num_rows), pa.int64()),
            "text_wanted": [True] * num_rows,
            **columns,
        }
    )


def decoded(table, *, modalities=None, limits=LIMITS, carry_columns=(), decoder="cpu", meter=None):
    if modalities is None:
        modalities = ["image"] if "image" in table.column_names else ["text"]
    return decode_batch(
        table,
        modalities=modalities,
        preprocessing=PREPROCESSING,
        limits=limits,
        carry_columns=carry_columns,
        decoder=decoder,
        meter=meter or ListMeter(),
    )


def test_every_reason_of_the_closed_set_is_given_by_some_row():
    of_encoding = {Reason.NOT_ENCODABLE, Reason.POISON}
    assert set(BAD_IMAGES) | set(BAD_TEXTS) | OF_WHOLE_ROWS | of_encoding == REASONS


@pytest.mark.parametrize("reason", BAD_IMAGES)
def test_a_bad_image_is_rejected_with_its_reason(reason):
    (row,) = decoded(image_rows(BAD_IMAGES[reason])).to_pylist()
    assert (row["reason"], row["stage"], row["pixels"]) == (reason, "decode", None)
    assert row["detail"] or reason == "null_image"


def test_a_uri_that_is_not_utf8_is_a_fetch_that_failed_and_counts_only_without_bytes():
    uri = b"file:///caf\xe9.jpg"
    row, other = decoded(image_rows((None, uri), (image_files.png(), uri))).to_pylist()
    assert row["reason"] == "fetch_failed"
    assert row["detail"].startswith("URI is not UTF-8: ")
    assert other["reason"] is None


@pytest.mark.parametrize("reason", BAD_TEXTS)
def test_a_bad_text_is_rejected_with_its_reason(reason):
    (row,) = decoded(text_rows(BAD_TEXTS[reason])).to_pylist()
    assert (row["reason"], row["stage"], row["text"]) == (reason, "decode", None)
    assert row["detail"] or reason == "null_text"


def test_an_image_of_too_many_pixels_is_rejected_by_its_header():
    limits = RowLimits(image=ImageLimits(max_image_pixels=48 * 32 - 1))
    (row,) = decoded(image_rows((image_files.png(), None)), limits=limits).to_pylist()
    assert row["reason"] == "image_too_large"
    limits = RowLimits(image=ImageLimits(max_image_pixels=48 * 32))
    (row,) = decoded(image_rows((image_files.png(), None)), limits=limits).to_pylist()
    assert row["reason"] is None


def test_bad_images_do_not_disturb_their_neighbours():
    good = image_files.png()
    contents = [content for bad in BAD_IMAGES.values() for content in (bad, (good, None))]
    rows = decoded(image_rows(*contents)).to_pylist()
    assert [row["reason"] for row in rows[::2]] == list(BAD_IMAGES)
    for row in rows[1::2]:
        assert (row["stage"], row["reason"], row["detail"]) == (None, None, None)
        assert row["pixels"] == RED.tobytes()
    assert [row["key"] for row in rows] == [f"k{number}" for number in range(len(contents))]
    assert [row["source_row"] for row in rows] == list(range(10, 10 + len(contents)))


@pytest.mark.parametrize("name", image_files.VALID)
def test_pixels_are_those_of_the_one_preprocessing(name):
    encoded = image_files.VALID[name]()
    (row,) = decoded(image_rows((encoded, None))).to_pylist()
    pixels = np.frombuffer(row["pixels"], np.uint8).reshape(8, 8, 3)
    expected = decode_pixels(encoded, preprocessing=PREPROCESSING, limits=LIMITS.image)
    assert np.array_equal(pixels, expected)


def test_an_image_without_bytes_is_fetched_and_one_with_bytes_is_not(tmp_path):
    path = tmp_path / "red.png"
    path.write_bytes(image_files.png())
    table = image_rows(
        (None, f"file://{path}"),
        (image_files.png(), "file:///nowhere"),
        (None, ""),
        (None, str(path)),
    )
    rows = decoded(table).to_pylist()
    assert [row["reason"] for row in rows] == [None, None, "null_image", None]
    assert {row["pixels"] for row in rows} == {RED.tobytes(), None}


def test_a_file_beyond_the_bound_is_too_large_after_fetching_too(tmp_path):
    path = tmp_path / "large.png"
    path.write_bytes(image_files.png() + bytes(100_000))
    (row,) = decoded(image_rows((None, f"file://{path}"))).to_pylist()
    assert row["reason"] == "image_too_large"


def test_where_gpus_decode_only_what_they_take_is_left_to_them():
    jpeg, png = image_files.jpeg(), image_files.png()
    early = jpeg[: len(jpeg) // 2] + b"\xff\xd9"
    contents = [jpeg, png, jpeg[:-30], early, None]
    table = image_rows(*((content, None) for content in contents))
    found = decoded(table, decoder="gpu").to_pylist()
    assert [row["encoded"] for row in found] == [jpeg, None, None, None, None]
    size = Image.open(io.BytesIO(jpeg)).size
    assert [row["geometry"] for row in found] == [[*size, 1], None, None, None, None]
    (by_cpu,) = decoded(image_rows((png, None))).to_pylist()
    assert [row["pixels"] for row in found] == [None, by_cpu["pixels"], None, None, None]
    reasons = [None, None, "truncated_image", "truncated_image", "null_image"]
    assert [row["reason"] for row in found] == reasons
    assert {row["encoded"] for row in decoded(table).to_pylist()} == {None}
    fingerprints = [row["fingerprint"] for row in found]
    assert fingerprints == [row["fingerprint"] for row in decoded(table).to_pylist()]


@pytest.mark.parametrize(("num_others", "is_shared"), [(1, True), (4, False)])
def test_encoded_images_are_shared_where_most_bytes_are_passed_on(num_others: int, is_shared: bool):
    jpeg = image_files.jpeg()
    others = b"no image" * (num_others * len(jpeg) // 8)
    table = image_rows(*((content, None) for content in [jpeg, jpeg, others]))
    found = decoded(table, decoder="gpu")["encoded"].chunk(0)
    assert found.to_pylist() == [jpeg, jpeg, None]
    images = table["image"].chunk(0)
    assert (found.buffers()[2].address == images.buffers()[2].address) == is_shared


def test_a_jpeg_that_takes_a_gpu_too_long_is_decoded_here(monkeypatch: pytest.MonkeyPatch):
    jpeg = image_files.jpeg()
    table = image_rows((jpeg, None))
    monkeypatch.setattr(decode, "MAX_GPU_IMAGE_BYTES", len(jpeg))
    (row,) = decoded(table, decoder="gpu").to_pylist()
    assert (row["encoded"], row["pixels"]) == (jpeg, None)
    monkeypatch.setattr(decode, "MAX_GPU_IMAGE_BYTES", len(jpeg) - 1)
    (row,) = decoded(table, decoder="gpu").to_pylist()
    assert (row["encoded"], row["pixels"]) == (None, decoded(table).to_pylist()[0]["pixels"])


def test_a_fetched_jpeg_is_left_to_the_gpu_too(tmp_path):
    path = tmp_path / "there.jpg"
    path.write_bytes(image_files.jpeg())
    (row,) = decoded(image_rows((None, str(path))), decoder="gpu").to_pylist()
    assert (row["encoded"], row["pixels"]) == (image_files.jpeg(), None)


def test_texts_pass_as_they_are_up_to_the_bound():
    texts = [" kept as it is "[:10], "x" * 10, "\U0001f600" * 10, "\0"]
    rows = decoded(text_rows(*texts)).to_pylist()
    assert [row["text"] for row in rows] == texts
    assert [row["reason"] for row in rows] == [None] * 4
    assert [row["pixels"] for row in rows] == [None] * 4


def test_only_what_is_wanted_comes_out_once_for_each_modality():
    table = image_rows(
        *[(image_files.png(), None)] * 3,
        image_wanted=[True, False, True],
        text=pa.array([b"a", b"b", None]),
        text_wanted=[True, True, True],
    )
    rows = decoded(table, modalities=["image", "text"]).to_pylist()
    assert [(row["key"], row["modality"], row["reason"]) for row in rows] == [
        ("k0", "image", None),
        ("k2", "image", None),
        ("k0", "text", None),
        ("k1", "text", None),
        ("k2", "text", "null_text"),
    ]


def test_nothing_wanted_gives_no_rows():
    table = image_rows(
        (image_files.png(), None), image_wanted=[False], text=[b"a"], text_wanted=[False]
    )
    assert decoded(table, modalities=["image", "text"]).num_rows == 0


def test_fingerprints_are_of_the_catalogs_rows_rejected_or_not():
    table = text_rows("one", None, "x" * 11)
    assert decoded(table)["fingerprint"].combine_chunks() == row_fingerprints(
        table, modality="text"
    )


def test_carried_columns_come_along_with_good_and_bad_rows():
    table = text_rows("one", None, price=[1.5, None], tags=[["a"], []])
    out = decoded(table, carry_columns=("price", "tags"))
    assert out["price"].to_pylist() == [1.5, None]
    assert out["tags"].to_pylist() == [["a"], []]


def test_the_columns_are_those_that_the_next_stages_read():
    assert decoded(text_rows("one")).schema == pa.schema(
        {
            "key": pa.string(),
            "modality": pa.string(),
            "pixels": pa.large_binary(),
            "encoded": pa.large_binary(),
            "geometry": GEOMETRY_TYPE,
            "text": pa.string(),
            "fingerprint": pa.binary(16),
            "stage": pa.string(),
            "reason": pa.string(),
            "detail": pa.string(),
            "source_file": pa.string(),
            "source_row": pa.int64(),
        }
    )


def test_rows_that_cannot_be_decoded_without_harm_are_rejects_like_others():
    table = image_rows(*[(image_files.png(), None)] * 3, price=[1, 2, 3])
    causes = {2: "was killed by SIGSEGV", 0: "ended with 7"}
    rejects = undecodable(table, causes, modality="image", carry_columns=["price"])
    rows = decoded(table, carry_columns=["price"])
    assert rejects.schema == rows.schema
    fine = rows.take([2, 0]).to_pylist()
    assert rejects.to_pylist() == [
        {
            **row,
            "pixels": None,
            "stage": "decode",
            "reason": "poison",
            "detail": f"a process that decoded it alone {cause}",
        }
        for row, cause in zip(fine, causes.values(), strict=True)
    ]


def test_the_meter_counts_what_comes_out():
    meter = ListMeter()
    out = decoded(text_rows("one", None), meter=meter)
    assert meter.batches == [(2, out.nbytes)]


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_text_chars": 0}, "max_text_chars=0: expected at least 1"),
        ({"max_reject_share": 1.1}, "max_reject_share=1.1: expected 0 to 1"),
        ({"max_reject_share": -0.1}, "max_reject_share=-0.1: expected 0 to 1"),
    ],
)
def test_limits_out_of_bounds_are_refused(limits, message):
    with pytest.raises(ValueError, match=message):
        RowLimits(**limits)


@pytest.mark.parametrize("decoder", ["cpu", "gpu"])
def test_what_was_fetched_is_held_no_longer_than_it_takes(tmp_path, monkeypatch, decoder):
    """However many images a batch has, and however large they are."""
    monkeypatch.setattr(fetch, "MAX_AHEAD_BYTES", 3_000_000)
    (tmp_path / "large.jpg").write_bytes(image_files.text_file() + bytes(1_000_000))
    (tmp_path / "red.jpg").write_bytes(image_files.jpeg())
    names = ["red.jpg", *["large.jpg"] * 40, "red.jpg"]
    table = image_rows(*((None, str(tmp_path / name)) for name in names))
    limits = replace(LIMITS, image=ImageLimits(max_image_bytes=2_000_000))
    tracemalloc.start()
    try:
        rows = decoded(table, limits=limits, decoder=decoder).to_pylist()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert [row["reason"] for row in rows] == [None, *["not_an_image"] * 40, None]
    for row in (rows[0], rows[-1]):
        assert row["pixels" if decoder == "gpu" else "encoded"] is None
        kept = row["encoded" if decoder == "gpu" else "pixels"]
        assert len(kept) == len(image_files.jpeg() if decoder == "gpu" else RED.tobytes())
    assert peak < 20_000_000
