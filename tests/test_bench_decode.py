"""`clipmill bench decode` where there is a GPU, with Pillow in its place."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from engine.decoding.jpeg_header import Geometry
from engine.decoding.jpegs import Jpegs
from engine.errors import EngineError
from engine.images import ImageLimits, ImageRejected
from engine.preprocess import Preprocessing, decode_pixels
from jobs.benches.decode import DecodeConfig, DecodeFigures, beside_gpu, decode_lines
from pipelines.engines import EngineChoice
from pipelines.errors import CatalogError
from tests import image_files

PREPROCESSING = Preprocessing(
    height=16,
    width=16,
    resize=16,
    crop=(16, 16),
    resample=3,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)
# A PNG stays with the CPU, so that rows of the GPU are not those of the catalog.
IMAGES = [image_files.png(), *(image_files.jpeg(image_files.photo(48, 32, seed=s)) for s in (1, 2))]
GEOMETRIES = [None, Geometry(48, 32, 1), Geometry(48, 32, 1)]


def by_pillow(encoded: bytes) -> np.ndarray:
    return decode_pixels(encoded, preprocessing=PREPROCESSING, limits=ImageLimits())


def decode(jpegs: Jpegs, *, rejected: Any = None) -> Any:
    pixels = np.stack([by_pillow(jpegs.image(row)) for row in range(len(jpegs))])
    return SimpleNamespace(
        pixels=torch.from_numpy(pixels), rejected=rejected or {}, num_by_cpu=1, card_seconds=0.0
    )


def embeddings(pixels: np.ndarray) -> np.ndarray:
    vectors = pixels.reshape(len(pixels), -1).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def measured(
    *, geometries: list[Geometry | None], decode: Callable[[Jpegs], Any] = decode
) -> DecodeFigures:
    return beside_gpu(
        DecodeFigures(device="a card", num_images=3, mean_bytes=1.0, timings=()),
        config=DecodeConfig(
            catalog_uri="photos",
            engine=EngineChoice(checkpoint="any"),
            batch_sizes=(2, 3),
            seconds=0.01,
        ),
        images=IMAGES,
        geometries=geometries,
        pixels=np.stack(list(map(by_pillow, IMAGES))),
        decode=decode,
        encode=embeddings,
    )


def test_rows_that_the_gpu_decodes_are_compared_with_their_own():
    figures = measured(geometries=GEOMETRIES)
    assert [timing.batch_rows for timing in figures.timings] == [2, 2, 3, 3]
    assert figures.num_by_cpu == 2
    assert figures.cosine_min == pytest.approx(1, abs=1e-6)
    assert "2 images were left to a CPU" in decode_lines(figures)[-1]


def test_other_pixels_show():
    def flipped(jpegs: Jpegs) -> Any:
        decoded = decode(jpegs)
        decoded.pixels = 255 - decoded.pixels
        return decoded

    cosine = measured(geometries=GEOMETRIES, decode=flipped).cosine_p1
    assert cosine is not None
    assert cosine < 0.99


def test_a_catalog_without_an_image_for_the_gpu_is_refused():
    with pytest.raises(CatalogError, match="catalog photos: no image is one that a GPU decodes"):
        measured(geometries=[None, None, None])


def test_an_image_that_only_the_gpu_rejects_is_an_error():
    def rejecting(jpegs: Jpegs) -> Any:
        return decode(jpegs, rejected={0: ImageRejected("truncated_image", "no")})

    with pytest.raises(EngineError, match="rejects images that Pillow decodes"):
        measured(geometries=GEOMETRIES, decode=rejecting)
