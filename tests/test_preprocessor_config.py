"""Tests of engine/preprocessor_config.py: real checkpoints' files, and transformers' defaults."""

from collections.abc import Mapping
from typing import Any

import pytest
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from engine.preprocessor_config import preprocessing_from_config

CLIP_CONFIG: Mapping[str, object] = {"image_processor_type": "CLIPImageProcessor"}
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
HALF = (0.5, 0.5, 0.5)
CONFIGS: dict[str, tuple[Mapping[str, object], int, Mapping[str, object]]] = {
    "clip, nothing else": (CLIP_CONFIG, 224, {"resize": 224, "crop": (224, 224), "resample": 3}),
    "openai clip of 2021": (
        {
            "crop_size": 336,
            "do_center_crop": True,
            "do_normalize": True,
            "do_resize": True,
            "feature_extractor_type": "CLIPFeatureExtractor",
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "resample": 3,
            "size": 336,
        },
        336,
        {"resize": 336, "crop": (336, 336), "rescale_factor": 1 / 255, "mean": CLIP_MEAN},
    ),
    "clip fast": (
        {"image_processor_type": "CLIPImageProcessorFast", "size": {"shortest_edge": 224}},
        224,
        {"resize": 224, "crop": (224, 224)},
    ),
    "clip pil": ({"image_processor_type": "CLIPImageProcessorPil"}, 224, {"resize": 224}),
    "nulls": (
        {**CLIP_CONFIG, "size": None, "crop_size": None, "do_pad": None, "image_mean": None},
        224,
        {"resize": 224, "crop": (224, 224), "mean": CLIP_MEAN},
    ),
    "chinese clip": (
        {
            "image_processor_type": "ChineseCLIPFeatureExtractor",
            "size": {"height": 224, "width": 224},
        },
        224,
        {"resize": (224, 224), "crop": (224, 224)},
    ),
    "clip to an exact size": (
        {**CLIP_CONFIG, "size": {"height": 224, "width": 224}, "do_center_crop": False},
        224,
        {"resize": (224, 224), "crop": None},
    ),
    "list size": (
        {**CLIP_CONFIG, "size": [224, 224], "do_center_crop": False},
        224,
        {"resize": (224, 224)},
    ),
    "siglip": (
        {"image_processor_type": "SiglipImageProcessor", "size": {"height": 384, "width": 384}},
        384,
        {"resize": (384, 384), "crop": None, "resample": 3, "mean": HALF, "std": HALF},
    ),
    "siglip 2": (
        {
            "image_processor_type": "SiglipImageProcessor",
            "do_convert_rgb": None,
            "resample": 2,
            "size": {"height": 256, "width": 256},
        },
        256,
        {"resize": (256, 256), "crop": None, "resample": 2, "mean": HALF, "std": HALF},
    ),
    "vit": (
        {"image_processor_type": "ViTImageProcessor"},
        224,
        {"resize": (224, 224), "crop": None, "resample": 2, "mean": HALF, "std": HALF},
    ),
    "vit of 2021": (
        {"feature_extractor_type": "ViTFeatureExtractor", "size": 384, "resample": 2},
        384,
        {"resize": (384, 384), "crop": None},
    ),
    "dinov2": (
        {
            "image_processor_type": "BitImageProcessor",
            "crop_size": {"height": 224, "width": 224},
            "size": {"shortest_edge": 256},
            "image_mean": [0.485, 0.456, 0.406],
            "image_std": [0.229, 0.224, 0.225],
        },
        224,
        {"resize": 256, "crop": (224, 224), "mean": (0.485, 0.456, 0.406)},
    ),
    "no resize": ({**CLIP_CONFIG, "do_resize": False}, 224, {"resize": None}),
    "no normalise": (
        {**CLIP_CONFIG, "do_normalize": False},
        224,
        {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "rescale_factor": 1 / 255},
    ),
    "no rescale": ({**CLIP_CONFIG, "do_rescale": False}, 224, {"rescale_factor": 1.0}),
    "one mean": ({**CLIP_CONFIG, "image_mean": 0.5}, 224, {"mean": HALF}),
    "other factor": (
        {**CLIP_CONFIG, "rescale_factor": 1 / 127.5},
        224,
        {"rescale_factor": 1 / 127.5},
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_config(name: str) -> None:
    config, image_size, expected = CONFIGS[name]
    parsed = preprocessing_from_config(config)
    assert (parsed.height, parsed.width) == (image_size, image_size)
    assert {field: getattr(parsed, field) for field in expected} == dict(expected)


@pytest.mark.parametrize(
    "processor",
    [CLIPImageProcessorPil, SiglipImageProcessorPil, ViTImageProcessorPil, BitImageProcessorPil],
)
def test_defaults_are_those_of_transformers(processor: Any) -> None:
    reference = processor()
    config = {"image_processor_type": processor.__name__}
    parsed = preprocessing_from_config(config)
    assert parsed.resample == reference.resample
    assert parsed.mean == tuple(reference.image_mean)
    assert parsed.std == tuple(reference.image_std)
    assert parsed.rescale_factor == reference.rescale_factor
    assert (parsed.crop is not None) == bool(reference.do_center_crop)


MALFORMED: list[tuple[Mapping[str, object], str]] = [
    ({}, "image_processor_type=None"),
    ({"image_processor_type": "BlipImageProcessor"}, "image_processor_type='BlipImageProcessor'"),
    ({"image_processor_type": 3}, "image_processor_type=3"),
    ({"image_processor_type": "CLIP"}, "image_processor_type='CLIP'"),
    ({**CLIP_CONFIG, "size": {"longest_edge": 224}}, "size=.*expected"),
    ({**CLIP_CONFIG, "size": {"shortest_edge": 224, "longest_edge": 500}}, "size=.*expected"),
    ({**CLIP_CONFIG, "size": "224"}, "size='224'"),
    ({**CLIP_CONFIG, "size": 0}, "size=0"),
    ({**CLIP_CONFIG, "size": True}, "size=True"),
    ({**CLIP_CONFIG, "size": {"height": 224.5, "width": 224}}, "size=.*expected"),
    ({**CLIP_CONFIG, "size": [224]}, "size=.*expected"),
    ({**CLIP_CONFIG, "crop_size": {"shortest_edge": 224}}, "crop_size=.*expected"),
    ({**CLIP_CONFIG, "crop_size": -1}, "crop_size=-1"),
    ({**CLIP_CONFIG, "do_center_crop": False}, "do_center_crop=False.*different sizes"),
    ({**CLIP_CONFIG, "do_center_crop": False, "do_resize": False}, "different sizes"),
    ({**CLIP_CONFIG, "do_resize": "yes"}, "do_resize='yes'.*true or false"),
    ({**CLIP_CONFIG, "do_rescale": 1}, "do_rescale=1"),
    ({**CLIP_CONFIG, "do_pad": True}, "do_pad=True"),
    ({**CLIP_CONFIG, "resample": 9}, "resample=9"),
    ({**CLIP_CONFIG, "resample": "bicubic"}, "resample='bicubic'"),
    ({**CLIP_CONFIG, "rescale_factor": 0}, "rescale_factor=0"),
    ({**CLIP_CONFIG, "rescale_factor": "1/255"}, "rescale_factor='1/255'"),
    ({**CLIP_CONFIG, "image_mean": [0.5, 0.5]}, "image_mean=.*three numbers"),
    ({**CLIP_CONFIG, "image_mean": ["a", "b", "c"]}, "image_mean=.*three numbers"),
    ({**CLIP_CONFIG, "image_std": [0.0, 1.0, 1.0]}, "std=.*above 0"),
    ({**CLIP_CONFIG, "image_std": [float("nan"), 1.0, 1.0]}, "std=.*finite"),
    ({"image_processor_type": "SiglipImageProcessor", "size": 224}, "different sizes"),
    ({"image_processor_type": "ViTImageProcessor", "do_center_crop": True}, "crop_size=None"),
]


@pytest.mark.parametrize(("config", "message"), MALFORMED, ids=str)
def test_malformed_config(config: Mapping[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        preprocessing_from_config(config)
