"""Compares an engine with transformers' own model, image processor and tokenizer.

Knows nothing of how either is executed.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from PIL import Image

from engine.backends.onnx_cpu import OnnxCpuEncoder
from engine.build import load_or_build
from engine.checkpoint import Checkpoint, find_checkpoint
from engine.images import ImageLimits
from engine.manifest import TextInput
from engine.preprocess import decode_pixels
from engine.registry import Registry
from jobs.benches.baselines import image_embeddings, load_tokenizer, load_transformers
from jobs.benches.catalog_rows import first_rows
from pipelines import schema
from pipelines.schema import Modality

ROWS_PER_CALL = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """Cosine between an engine's embeddings and transformers' of the same rows."""

    modality: str
    """image or text."""
    num_rows: int
    """Rows compared."""
    mean: float
    """Of the cosines."""
    p1: float
    """1st percentile."""
    minimum: float
    """Worst row."""


def measure_agreement(
    name: str, *, catalog_uri: str, num_rows: int, engines_uri: str
) -> list[Agreement]:
    """Embed the first rows of a catalog both ways.

    Args:
        name: Checkpoint, a hub id or a folder.
        catalog_uri: With `image` bytes, and `text` if the checkpoint has a text tower.
        num_rows: How many rows; those without image or text are left out.
        engines_uri: Where engines are kept.

    Raises:
        CatalogError: The catalog lacks such a column or such rows.
    """
    checkpoint = find_checkpoint(name)
    engine = load_or_build(checkpoint, registry=Registry(engines_uri))
    encoder = OnnxCpuEncoder(engine.directory, num_threads=2)
    modalities: tuple[Modality, ...] = ("image", "text") if engine.manifest.text else ("image",)
    rows = first_rows(catalog_uri, modalities=modalities, num_rows=num_rows)
    images = rows[schema.IMAGE].to_pylist()
    pixels = [
        decode_pixels(image, preprocessing=engine.manifest.preprocessing, limits=ImageLimits())
        for image in images
    ]
    reference = _Reference(checkpoint, text=engine.manifest.text)
    results = [_compare("image", encoder.encode_images(np.stack(pixels)), reference.images(images))]
    if engine.manifest.text is not None:
        texts = [text.decode() for text in rows[schema.TEXT].to_pylist()]
        results.append(_compare("text", encoder.encode_texts(texts), reference.texts(texts)))
    return results


def agreement_line(result: Agreement) -> str:
    """One modality in one line."""
    return (
        f"{result.modality}: cosine to transformers mean {result.mean:.7f}, "
        f"1st percentile {result.p1:.7f}, minimum {result.minimum:.7f} ({result.num_rows} rows)"
    )


def _compare(modality: str, ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> Agreement:
    cosines = np.sum(ours.astype(np.float64) * theirs, axis=1)
    return Agreement(
        modality=modality,
        num_rows=len(cosines),
        mean=float(cosines.mean()),
        p1=float(np.percentile(cosines, 1)),
        minimum=float(cosines.min()),
    )


class _Reference:
    """transformers alone, in float32 on the CPU, images through Pillow."""

    def __init__(self, checkpoint: Checkpoint, *, text: TextInput | None) -> None:
        self._model = load_transformers(checkpoint, dtype=torch.float32)
        # With torchvision installed the default is another resize than the one trained with.
        self._processor = transformers.AutoImageProcessor.from_pretrained(
            str(checkpoint.directory), backend="pil", trust_remote_code=False
        )
        self._text = text
        if text is not None:
            self._tokenizer = load_tokenizer(checkpoint)

    def images(self, encoded: Sequence[bytes]) -> NDArray[np.float32]:
        def embed(part: Sequence[bytes]) -> Any:
            pictures = [Image.open(io.BytesIO(image)) for image in part]
            pixels = self._processor(images=pictures, return_tensors="pt")
            return image_embeddings(self._model, pixels["pixel_values"])

        return self._in_calls(encoded, embed)

    def texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        def embed(part: Sequence[str]) -> Any:
            text = self._text
            assert text is not None
            tokens = self._tokenizer(
                list(part),
                padding="max_length" if text.pads_to_max else True,
                truncation=True,
                max_length=text.max_tokens,
                return_tensors="pt",
            )
            if text.pads_to_max:
                # The model sees padding, as it did in training.
                tokens = {"input_ids": tokens["input_ids"]}
            return self._model.get_text_features(**tokens).pooler_output

        return self._in_calls(texts, embed)

    def _in_calls(self, rows: Sequence[Any], embed: Any) -> NDArray[np.float32]:
        with torch.inference_mode():
            parts = [
                torch.nn.functional.normalize(embed(rows[first : first + ROWS_PER_CALL]), dim=-1)
                for first in range(0, len(rows), ROWS_PER_CALL)
            ]
        joined: NDArray[np.float32] = torch.cat(parts).numpy()
        return joined
