"""Tests of engine/preprocess.py against transformers' own image processors."""

import dataclasses
import io
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from engine.images import ImageLimits, ImageRejected, rgb_image
from engine.preprocess import decode_pixels
from engine.preprocessor_config import preprocessing_from_config
from tests import image_files

LIMITS = ImageLimits()
CLIP_CONFIG: Mapping[str, object] = {"image_processor_type": "CLIPImageProcessor"}
CLIP = preprocessing_from_config(CLIP_CONFIG)
PROCESSORS = {
    "CLIPImageProcessor": CLIPImageProcessorPil,
    "SiglipImageProcessor": SiglipImageProcessorPil,
    "ViTImageProcessor": ViTImageProcessorPil,
    "BitImageProcessor": BitImageProcessorPil,
}


def reference_pixels(image: Image.Image, config: Mapping[str, Any]) -> np.ndarray:
    """uint8 [H, W, 3] by transformers, before rescaling and normalisation."""
    options = {name: value for name, value in config.items() if name != "image_processor_type"}
    processor = PROCESSORS[config["image_processor_type"]](
        **{**options, "do_rescale": False, "do_normalize": False}
    )
    (pixels,) = processor(images=image.convert("RGB"))["pixel_values"]
    return np.moveaxis(pixels, 0, -1)


# --- Geometry: the same pixels as transformers ---

ASPECTS = [
    (224, 224),
    (500, 375),
    (375, 500),
    (333, 500),
    (640, 479),
    (225, 224),
    (223, 641),
    (1000, 101),
    (101, 1000),
    (60, 40),
    (5, 7),
    (1, 1),
]
GEOMETRIES: list[Mapping[str, Any]] = [
    CLIP_CONFIG,
    {**CLIP_CONFIG, "resample": 2},
    {**CLIP_CONFIG, "resample": 0},
    {**CLIP_CONFIG, "size": {"shortest_edge": 200}},
    {**CLIP_CONFIG, "size": {"shortest_edge": 77}},
    {**CLIP_CONFIG, "size": {"shortest_edge": 257}, "resample": 1},
    {**CLIP_CONFIG, "size": {"height": 256, "width": 231}},
    {**CLIP_CONFIG, "do_resize": False},
    {"image_processor_type": "SiglipImageProcessor"},
    {"image_processor_type": "SiglipImageProcessor", "resample": 2},
    {"image_processor_type": "ViTImageProcessor"},
    {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 256}},
]


@pytest.mark.parametrize("config", GEOMETRIES, ids=str)
@pytest.mark.parametrize("size", ASPECTS, ids=str)
def test_pixels_are_those_of_transformers(size: tuple[int, int], config: Mapping[str, Any]) -> None:
    image = image_files.photo(*size)
    pixels = decode_pixels(
        image_files.png(image),
        preprocessing=preprocessing_from_config(config),
        limits=LIMITS,
    )
    np.testing.assert_array_equal(pixels, reference_pixels(image, config))


@pytest.mark.parametrize("crop", [225, 31], ids=str)
def test_odd_outputs_are_those_of_transformers(crop: int) -> None:
    config = {**CLIP_CONFIG, "size": {"shortest_edge": 100}, "crop_size": crop}
    image = image_files.photo(250, 161)
    pixels = decode_pixels(
        image_files.png(image),
        preprocessing=preprocessing_from_config(config),
        limits=LIMITS,
    )
    np.testing.assert_array_equal(pixels, reference_pixels(image, config))


@given(
    width=st.integers(1, 700), height=st.integers(1, 700), edge=st.integers(1, 300), seed=st.just(3)
)
@settings(max_examples=25)
def test_any_ordinary_size_gives_the_pixels_of_transformers(
    width: int, height: int, edge: int, seed: int
) -> None:
    # Beyond 20 to 1 the crop happens while resizing, and rounding may differ.
    width, height = max(width, height // 20 + 1), max(height, width // 20 + 1)
    config = {**CLIP_CONFIG, "size": {"shortest_edge": edge}}
    image = image_files.photo(width, height, seed=seed)
    pixels = decode_pixels(
        image_files.png(image),
        preprocessing=preprocessing_from_config(config),
        limits=LIMITS,
    )
    np.testing.assert_array_equal(pixels, reference_pixels(image, config))


def test_jpeg_and_grey_pixels_are_those_of_transformers() -> None:
    for image in (image_files.photo(440, 330), image_files.photo(440, 330).convert("L")):
        encoded = image_files.jpeg(image)
        pixels = decode_pixels(encoded, preprocessing=CLIP, limits=LIMITS)
        decoded = Image.open(io.BytesIO(encoded))
        np.testing.assert_array_equal(pixels, reference_pixels(decoded, CLIP_CONFIG))


def test_transparency_is_composited_as_in_transformers() -> None:
    image = image_files.photo(300, 200)
    image.putalpha(image_files.photo(300, 200, seed=1).convert("L"))
    pixels = decode_pixels(image_files.png(image), preprocessing=CLIP, limits=LIMITS)
    processor = CLIPImageProcessorPil(do_rescale=False, do_normalize=False)
    (expected,) = processor(images=image)["pixel_values"]
    np.testing.assert_array_equal(pixels, np.moveaxis(expected, 0, -1))


def test_pixels_are_contiguous_writable_uint8() -> None:
    for view in (image_files.png(), memoryview(image_files.png())):
        pixels = decode_pixels(view, preprocessing=CLIP, limits=LIMITS)
        assert pixels.dtype == np.uint8
        assert pixels.shape == (224, 224, 3)
        assert pixels.flags.c_contiguous
        assert pixels.flags.writeable


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (3, 900), (900, 3), (40, 900)])
@pytest.mark.parametrize("processor", ["CLIPImageProcessor", "SiglipImageProcessor"])
def test_extreme_aspects_come_close_to_transformers(size: tuple[int, int], processor: str) -> None:
    config = {"image_processor_type": processor, "resample": 2}
    width, height = size
    ramp = np.linspace(0, 255, max(size)).astype(np.uint8)
    image = Image.fromarray(np.resize(ramp, (height, width)) if width > height else ramp[:, None])
    image = image.resize(size).convert("RGB")
    pixels = decode_pixels(
        image_files.png(image),
        preprocessing=preprocessing_from_config(config),
        limits=LIMITS,
    )
    if processor == "CLIPImageProcessor" and min(size) == 1:
        # The reference would need 4 GB. The middle of the ramp, and at most a source pixel of it.
        assert pixels.min() >= 126
        assert pixels.max() <= 129
    else:
        difference = np.abs(pixels.astype(int) - reference_pixels(image, config))
        assert difference.max() <= 1


def test_an_extreme_aspect_takes_little_memory() -> None:
    code = (
        "import resource, sys; from engine.preprocess import *; "
        "image = Preprocessing(height=224, width=224, resize={resize}, crop=(224, 224), "
        "resample=3, mean=(0.0,) * 3, std=(1.0,) * 3); encoded = sys.stdin.buffer.read(); "
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; "
        "decode_pixels(encoded, preprocessing=image, limits=ImageLimits()); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    for size in ((1, 500_000), (500_000, 1)):
        for resize in ("224", "(224, 224)"):
            done = subprocess.run(
                [sys.executable, "-c", code.format(resize=resize)],
                input=image_files.png(Image.new("RGB", size)),
                capture_output=True,
                check=True,
            )
            # Decoded, the strip has 2 MB; resized whole, it would have 450 MB or more.
            assert int(done.stdout) * 1024 < 100 * 2**20


def test_no_resize_means_a_crop_of_the_full_image() -> None:
    config = dataclasses.replace(CLIP, resize=None)
    image = image_files.photo(1200, 900)
    encoded = image_files.jpeg(image)
    pixels = decode_pixels(encoded, preprocessing=config, limits=LIMITS)
    full = np.asarray(rgb_image(encoded, limits=LIMITS))
    np.testing.assert_array_equal(pixels, full[338:562, 488:712])


# --- Any bytes whatsoever; tests/test_images.py has more of them ---


@given(st.sampled_from([make() for make in image_files.VALID.values()]), image_files.PATCHES)
@settings(max_examples=100)
def test_damage_never_raises_anything_else(
    encoded: bytes, patches: list[tuple[int, bytes]]
) -> None:
    damaged = image_files.patched(encoded, patches)
    limits = ImageLimits(max_image_pixels=1_000_000)
    for config in (CLIP, dataclasses.replace(CLIP, resize=None)):
        try:
            pixels = decode_pixels(damaged, preprocessing=config, limits=limits)
        except ImageRejected:
            continue
        assert pixels.shape == (224, 224, 3)


# --- Preprocessing ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"height": 225}, "height=225"),
        ({"resize": 0}, "resize=0"),
        ({"resize": (224, 0)}, r"resize=\(224, 0\)"),
        ({"crop": [224, 224]}, r"crop=\[224, 224\]"),
        ({"crop": None}, "different sizes"),
        ({"resample": True}, "resample=True"),
        ({"mean": [0.5, 0.5, 0.5]}, "mean=.*tuple"),
        ({"std": (1.0, -1.0, 1.0)}, "std=.*above 0"),
        ({"rescale_factor": float("inf")}, "rescale_factor=inf"),
    ],
    ids=str,
)
def test_preprocessing_is_validated(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CLIP, **change)


def test_no_torch_is_imported() -> None:
    code = "import sys, engine.preprocess; print('torch' in sys.modules, 'ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert done.stdout.split() == ["False", "False"]
