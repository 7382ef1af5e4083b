"""transformers' own model as an encoder, with which engines are compared.

Knows nothing of engines but their preprocessing and token length.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor

from engine.checkpoint import Checkpoint
from engine.errors import ClipmillError
from engine.manifest import Manifest

MAX_GRAPHS = 64


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
        self._encode_images: Callable[[Tensor], Tensor] = self._image_embeddings
        self._encode_texts: Callable[..., Tensor] = self._text_embeddings
        self.batch_rows: int | None = None
        """Of one pass; what has more is cut into as many. None: all are one."""

    def compile(self) -> None:
        """Let torch.compile work on both towers, each as one graph for each number of rows."""
        # By default the second number makes a graph for any, and the ninth would have none.
        torch._dynamo.config.recompile_limit = MAX_GRAPHS
        self._encode_images = torch.compile(self._encode_images, dynamic=False)
        self._encode_texts = torch.compile(self._encode_texts, dynamic=False)

    def encode_images(self, pixels: NDArray[np.uint8] | Tensor) -> NDArray[np.float32]:
        """Pixels uint8 [N, H, W, 3], RGB, HWC, anywhere -> float32 [N, D], unit norm.

        They are copied as bytes and normalized where the model is, which is the faster way.
        """
        with torch.inference_mode():
            return self._joined(
                [
                    self._encode_images(part.to(self._device))
                    for part in torch.as_tensor(pixels).split(self.batch_rows or len(pixels))
                ]
            )

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
        )
        if self._text.pads_to_max:
            tokens = {"input_ids": tokens["input_ids"]}  # padding is seen, as in training
        num_rows = self.batch_rows or len(texts)
        with torch.inference_mode():
            return self._joined(
                [
                    self._encode_texts(
                        **{
                            name: values[first : first + num_rows].to(self._device)
                            for name, values in tokens.items()
                        }
                    )
                    for first in range(0, len(texts), num_rows)
                ]
            )

    def _image_embeddings(self, uploaded: Tensor) -> Tensor:
        """Pixels uint8 [N, H, W, 3] -> float [N, D], unit norm."""
        x = (uploaded.permute(0, 3, 1, 2) - self._mean) / self._std
        return _unit(image_embeddings(self._model, x.to(self._dtype)))

    def _text_embeddings(self, **tokens: Tensor) -> Tensor:
        """Tokens int64 [N, T] -> float [N, D], unit norm."""
        return _unit(self._model.get_text_features(**tokens).pooler_output)

    @staticmethod
    def _joined(parts: list[Tensor]) -> NDArray[np.float32]:
        joined: NDArray[np.float32] = torch.cat(parts).cpu().numpy()
        return joined


def _unit(embeddings: Tensor) -> Tensor:
    return torch.nn.functional.normalize(embeddings.float(), dim=-1)
