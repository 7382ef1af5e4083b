"""transformers' own model as an encoder, with which engines are compared.

Knows nothing of engines but their preprocessing and token length.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor

from engine.checkpoint import Checkpoint
from engine.errors import ClipmillError
from engine.manifest import Manifest


def load_transformers(checkpoint: Checkpoint, *, dtype: torch.dtype) -> Any:
    """The checkpoint's model as transformers loads it, for inference."""
    transformers.logging.disable_progress_bar()
    kind: Any = transformers.AutoModel
    if checkpoint.model_type == "clip_vision_model":
        kind = transformers.CLIPVisionModelWithProjection
    return kind.from_pretrained(str(checkpoint.directory), dtype=dtype).eval()


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The checkpoint's tokenizer as transformers loads it; ClipmillError if it lacks a package."""
    try:
        return transformers.AutoTokenizer.from_pretrained(
            str(checkpoint.directory), trust_remote_code=False
        )
    except ImportError as error:  # SigLIP's runs on sentencepiece
        raise ClipmillError(
            f"checkpoint {checkpoint.name}: transformers' tokenizer cannot be loaded: {error}"
        ) from error


def image_embeddings(model: Any, pixel_values: Tensor) -> Tensor:
    """[N, D], not normalized, of float [N, 3, H, W]."""
    if hasattr(model, "get_image_features"):
        found: Tensor = model.get_image_features(pixel_values=pixel_values).pooler_output
        return found
    output = model(pixel_values=pixel_values)
    found = output.image_embeds if "image_embeds" in output else output.pooler_output
    return found


class TransformersEncoder:
    """Pixels and texts -> embeddings, as who uses transformers would, the model as it comes."""

    def __init__(
        self, checkpoint: Checkpoint, *, manifest: Manifest, device: str, dtype: torch.dtype
    ) -> None:
        """Load the model.

        Args:
            checkpoint: Of the engine that it is compared with.
            manifest: Of that engine.
            device: `cpu` or `cuda`.
            dtype: Of weights and activations.
        """
        self._model = load_transformers(checkpoint, dtype=dtype).to(device)
        self._tokenizer = load_tokenizer(checkpoint) if manifest.text is not None else None
        self._text = manifest.text
        self._device, self._dtype = device, dtype
        preprocessing = manifest.preprocessing
        self._mean, self._std = (
            torch.tensor(values, device=device).view(3, 1, 1) / preprocessing.rescale_factor
            for values in (preprocessing.mean, preprocessing.std)
        )
        self._images: Callable[[Tensor], Tensor] = partial(image_embeddings, self._model)
        self._texts: Callable[..., Any] = lambda **tokens: self._model.get_text_features(**tokens)

    def compile(self) -> None:
        """Let torch.compile work on both towers, each as one graph, in its default mode."""
        self._images = torch.compile(self._images)
        self._texts = torch.compile(self._texts)

    def encode_images(self, pixels: NDArray[np.uint8] | Tensor) -> NDArray[np.float32]:
        """Pixels uint8 [N, H, W, 3], RGB, HWC, anywhere -> float32 [N, D], unit norm.

        They are copied as bytes and normalized where the model is, which is the faster way.
        """
        with torch.inference_mode():
            uploaded = torch.as_tensor(pixels).to(self._device)
            x = (uploaded.permute(0, 3, 1, 2) - self._mean) / self._std
            return self._unit(self._images(x.to(self._dtype)))

    def encode_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Texts -> float32 [N, D], unit norm, padded to the model's length as its examples do."""
        assert self._tokenizer is not None
        assert self._text is not None
        tokens = self._tokenizer(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=self._text.max_tokens,
            return_tensors="pt",
        ).to(self._device)
        if self._text.pads_to_max:
            tokens = {"input_ids": tokens["input_ids"]}  # padding is seen, as in training
        with torch.inference_mode():
            return self._unit(self._texts(**tokens).pooler_output)

    def _unit(self, embeddings: Tensor) -> NDArray[np.float32]:
        unit = torch.nn.functional.normalize(embeddings.float(), dim=-1)
        result: NDArray[np.float32] = unit.cpu().numpy()
        return result
