"""The reference: a checkpoint's own towers in float32, against which engines are judged.

Knows nothing of engines but their tokenizer.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from engine.backends.encoder import TowerEncoder
from engine.backends.torch_device import full_float32
from engine.manifest import Manifest
from engine.model import Model

ROWS_PER_CALL = 16


class ReferenceEncoder(TowerEncoder):
    """An `Encoder` by torch in float32, without any quantization, fusion or export."""

    def __init__(self, model: Model, *, engine_dir: Path, manifest: Manifest, device: str) -> None:
        """Take a checkpoint's towers.

        Args:
            model: The towers; they are moved to the device.
            engine_dir: An engine of the same checkpoint, for its tokenizer.
            manifest: Of that engine.
            device: `cpu` or `cuda`.
        """
        super().__init__(
            engine_dir,
            manifest=manifest,
            image=_Tower(model.image_tower, device=device),
            text=None if model.text_tower is None else _Tower(model.text_tower, device=device),
        )


class _Tower:
    """A `TowerRunner` of one module."""

    max_rows = ROWS_PER_CALL
    length_step = 1

    def __init__(self, tower: nn.Module, *, device: str) -> None:
        self._tower = tower.to(device)
        self._device = device

    def run(self, batches: Iterable[NDArray[Any]]) -> Iterator[NDArray[np.float32]]:
        for batch in batches:
            with torch.inference_mode(), full_float32():
                # Copied, since torch warns of arrays that it could not write to.
                embeddings = self._tower(torch.tensor(batch, device=self._device))
            result: NDArray[np.float32] = embeddings.cpu().numpy()
            yield result
