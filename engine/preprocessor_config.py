"""Reads a checkpoint's `preprocessor_config.json` into the preprocessing that it asks for.

Knows nothing of images or files, only what the fields mean to transformers.
"""

import re
from collections.abc import Mapping

from engine.preprocess import Preprocessing

# Defaults of transformers 5.23, image_processing_pil_*.py; `int_size` says what an integer means.
_CLIP_DEFAULTS: Mapping[str, object] = {
    "int_size": "shortest_edge",
    "do_resize": True,
    "size": {"shortest_edge": 224},
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
    "do_pad": False,
}
_SIGLIP_DEFAULTS: Mapping[str, object] = {
    **_CLIP_DEFAULTS,
    "size": {"height": 224, "width": 224},
    "do_center_crop": False,
    "crop_size": None,
    "image_mean": (0.5, 0.5, 0.5),
    "image_std": (0.5, 0.5, 0.5),
}
_VIT_DEFAULTS: Mapping[str, object] = {**_SIGLIP_DEFAULTS, "int_size": "square", "resample": 2}
_PROCESSOR_DEFAULTS: Mapping[str, Mapping[str, object]] = {
    "CLIP": _CLIP_DEFAULTS,
    "ChineseCLIP": _CLIP_DEFAULTS,
    "Bit": _CLIP_DEFAULTS,
    "Siglip": _SIGLIP_DEFAULTS,
    "ViT": _VIT_DEFAULTS,
}
_PROCESSOR_TYPE = re.compile(r"(\w+?)(?:ImageProcessor(?:Fast|Pil)?|FeatureExtractor)")


def preprocessing_from_config(config: Mapping[str, object]) -> Preprocessing:
    """Read a checkpoint's `preprocessor_config.json`, as transformers' image processors do.

    Images always become RGB, whatever `do_convert_rgb` says. `do_rescale: false` gives a
    `rescale_factor` of 1, and `do_normalize: false` a mean of 0 and a std of 1.

    Args:
        config: The parsed JSON; keys that are missing or null take the processor's defaults.

    Raises:
        ValueError: A field is malformed or unsupported.
    """
    settings = {
        **_defaults_for(config),
        **{name: value for name, value in config.items() if value is not None},
    }
    flags = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_pad")
    resizes, crops, rescales, normalises, pads = (_flag(settings, name) for name in flags)
    if pads:
        raise ValueError("do_pad=True: expected false; padding to a size is not supported")
    resize = None
    if resizes:
        resize = _parse_size(settings, "size", int_means=str(settings["int_size"]))
    crop = _parse_size(settings, "crop_size", int_means="square") if crops else None
    if isinstance(crop, int):
        raise ValueError(
            f"crop_size={settings['crop_size']!r}: expected an integer or height and width"
        )
    output = crop or resize
    if not isinstance(output, tuple):
        raise ValueError(
            f"do_center_crop=False with do_resize={resizes} and size={settings['size']!r} leaves "
            "images of different sizes: expected a centre crop, or a size with height and width"
        )
    resample, rescale_factor = settings["resample"], settings["rescale_factor"]
    if not isinstance(resample, int):
        raise ValueError(f"resample={resample!r}: expected one of Pillow's filter codes 0 to 5")
    if not isinstance(rescale_factor, int | float):
        raise ValueError(f"rescale_factor={rescale_factor!r}: expected a number above 0")
    return Preprocessing(
        height=output[0],
        width=output[1],
        resize=resize,
        crop=crop,
        resample=resample,
        mean=_parse_channels(settings, "image_mean") if normalises else (0.0, 0.0, 0.0),
        std=_parse_channels(settings, "image_std") if normalises else (1.0, 1.0, 1.0),
        rescale_factor=float(rescale_factor) if rescales else 1.0,
    )


def _defaults_for(config: Mapping[str, object]) -> Mapping[str, object]:
    """Return the defaults of the processor that the config names under its new or old key."""
    name = config.get("image_processor_type") or config.get("feature_extractor_type")
    match = _PROCESSOR_TYPE.fullmatch(name) if isinstance(name, str) else None
    if match is None or match[1] not in _PROCESSOR_DEFAULTS:
        known = ", ".join(f"{prefix}ImageProcessor" for prefix in _PROCESSOR_DEFAULTS)
        raise ValueError(f"image_processor_type={name!r}: expected one of {known}")
    return _PROCESSOR_DEFAULTS[match[1]]


def _flag(settings: Mapping[str, object], name: str) -> bool:
    value = settings[name]
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r}: expected true or false")
    return value


def _parse_size(
    settings: Mapping[str, object], name: str, *, int_means: str
) -> int | tuple[int, int]:
    """Return a shortest edge, or (height, width)."""
    value = settings[name]
    sides: list[object] = []
    if isinstance(value, int):
        sides = [value] if int_means == "shortest_edge" else [value, value]
    elif isinstance(value, Mapping) and set(value) == {"shortest_edge"}:
        sides = [value["shortest_edge"]]
    elif isinstance(value, Mapping) and set(value) == {"height", "width"}:
        sides = [value["height"], value["width"]]
    elif isinstance(value, list | tuple) and len(value) == 2:
        sides = list(value)
    pixels = [side for side in sides if type(side) is int and side >= 1]
    if not sides or len(pixels) != len(sides):
        raise ValueError(
            f"{name}={value!r}: expected an integer above 0, or an object with such integers under "
            "shortest_edge, or under height and width"
        )
    return pixels[0] if len(pixels) == 1 else (pixels[0], pixels[1])


def _parse_channels(settings: Mapping[str, object], name: str) -> tuple[float, float, float]:
    value = settings[name]
    values = value if isinstance(value, list | tuple) else [value] * 3
    numbers = [float(number) for number in values if isinstance(number, int | float)]
    if len(values) != 3 or len(numbers) != 3:
        raise ValueError(f"{name}={value!r}: expected three numbers, for R, G and B")
    return numbers[0], numbers[1], numbers[2]
