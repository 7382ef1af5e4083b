"""Runs an engine's towers on a CUDA card with PyTorch, FP8 units on FP8 tensor cores.

Knows nothing of how the engine was built or where its inputs come from.

The least time that an H200 needs for one image of ViT-L/14 (24 blocks, 257 tokens, width 1024):
  layers       150 GFLOP in FP8, at 1,470 TFLOP/s                              102 us
  attention    6.5 GFLOP, half in FP8, half in 16 bit at 790 TFLOP/s; its 25 MB  6 us
  norms, sums  14 bytes for a channel of a token of a block, at 4.2 TB/s        21 us
Together 129 us, or 7,750 images/s. ViT-B/32 (12 blocks, 50 tokens, width 768): 5, 0.4 and 1.5 us.

Steps towards it on an H200, in ms for 256 images of ViT-L/14 and 1,024 of ViT-B/32:
                                                          predicted        measured
  where it stood                                                           61.4    20.6
  keys and values rounded once for a head (attention)     -6.5    -0.2     -9.7    not alone
  patches as a product, not a convolution                 -2.7    -7.5     -2.6    not alone
  the activation in the product before it                 -3.5    -1.0     not alone
  all three                                               48.7    11.9     49.1    12.3
  the same for seconds, not for ten batches                                50.2    12.8
  one instruction, tanh, for a sigmoid in FP8             -1.5    not made -1.7    not alone
  queries, keys and values in FP8 out of their product    -2.3    not made -2.0    not alone
  the last block for one token from attention on          -1.2    not made not alone
  eight columns, not 16, for attention's odd query        not made         -0.6    none
  all four                                                                 45.7    11.0
What limits then is the card's 700 W: it draws 690 and lowers its clock from 1,980 MHz to between
1,650 and 1,755, in products, attention and norms alike, so that a step gains as it saves energy. Of
the 32 J that 256 images of ViT-L/14 take, products take about 23. Steps from there, as graphs that
take turns for 1.3 s each, ViT-B/32 in batches of 512, on other H200s (the last two on one):
                                                          predicted        measured
  the residual sum in the product before a norm           -1.5    not made -1.8    -0.4
  the last block's attention for one tile of queries      -0.2     0       -0.4     0
  norms and attention from the last row to the first      -0.4    not made -0.2    -0.15
  an image's tokens in one kernel                         -0.3    -0.1     -0.3    -0.1
  attention's next queries loaded ahead                   not made         -0.2    0
The sum at the end of our own product kernel cost all the energy that it saved (-0.1, -0.2), and
attention by four programs at a time, of 128 registers, gained nothing. Queries of the last block
for one token alone (predicted: -0.15) gained 0.07 of 43.0 ms and 0.02 of 5.15, too little to keep.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from engine.backends.encoder import TowerEncoder
from engine.backends.torch_device import find_device, typed_errors
from engine.errors import EngineError
from engine.manifest import read_manifest
from engine.model import Model
from engine.stored_towers import load_towers

# Rows of a batch, and where images have few patches. On an H100, batches of 256, 512 and 1,024
# images of ViT-B/32 (49 patches) gave 72,758, 77,869 and 79,430 images/s; ViT-L/14 (256 patches)
# gave 4,960 in batches of 256, 4,999 in batches of 512.
MAX_ROWS, MAX_SMALL_ROWS = 256, 512
FEW_PATCHES = 64
# Lengths of texts are rounded up to this: ten graphs for CLIP's 77 tokens.
LENGTH_STEP = 8


class TorchEncoder(TowerEncoder):
    """An `Encoder` on a CUDA card, for fp8 and fp16 engines.

    The same batch gives the same bits. Other rows of a batch don't matter, but its shape does, at
    the level of rounding: cuBLAS has other kernels for other sizes.
    """

    device_memory_bytes: int
    """Taken on the card: weights, buffers and what the largest batches need between them."""
    max_calls = 2
    """So that the card has work while one call ends and the next begins."""

    def __init__(
        self,
        engine_dir: Path,
        *,
        load_towers: Callable[..., Model] = load_towers,
        max_rows: int | None = None,
        device_index: int = 0,
    ) -> None:
        """Load the towers and capture their largest batches.

        Args:
            engine_dir: The engine's folder, as the registry leaves it.
            load_towers: Reads that folder's towers onto the CPU.
            max_rows: Images or texts of one batch; None: as many as fill a card.
            device_index: Of the CUDA card.

        Raises:
            EngineError: The folder holds no whole engine, or one of a precision or width that
                this backend does not run.
            DeviceMemoryError: The largest batches do not fit.
            DeviceError: There is no such card, it has no FP8 and the engine has, or a call to it
                failed.
        """
        if max_rows is not None and max_rows < 1:
            raise ValueError(f"max_rows is {max_rows}, must be at least 1")
        manifest = read_manifest(engine_dir)
        if manifest.precision == "fp32":
            raise EngineError(
                f"engine {manifest.engine_id} is fp32, the torch backend runs fp8 and fp16; use "
                "`--backend onnxruntime`, or build one: `clipmill engine build --precision fp16`"
            )
        device = find_device(device_index, precision=manifest.precision)
        # Triton, which compiles the kernels, comes with PyTorch for CUDA only.
        from engine.backends.cuda_graphs import CudaGraphRunner
        from engine.backends.fused import fuse

        model = load_towers(engine_dir, preprocessing=manifest.preprocessing)
        max_rows = max_rows or _bulk_rows(model)
        with typed_errors(device, max_rows=max_rows):
            torch.cuda.empty_cache()  # what others left and this encoder would take counts too
            reserved_before = torch.cuda.memory_reserved(device)
            for tower in (model.image_tower, model.text_tower):
                if tower is not None:
                    fuse(tower.to(device))
            torch.cuda.empty_cache()  # the weights as they were before they were joined
            preprocessing = manifest.preprocessing
            image = CudaGraphRunner(
                model.image_tower,
                row_shape=(preprocessing.height, preprocessing.width, 3),
                dtype=torch.uint8,
                max_rows=max_rows,
                length_step=1,
                device=device,
            )
            text = None
            if model.text_tower is not None and manifest.text is not None:
                text = CudaGraphRunner(
                    model.text_tower,
                    row_shape=(manifest.text.max_tokens,),
                    dtype=torch.int32,
                    max_rows=max_rows,
                    length_step=LENGTH_STEP,
                    device=device,
                )
            self.device_memory_bytes = torch.cuda.memory_reserved(device) - reserved_before
        super().__init__(engine_dir, manifest=manifest, image=image, text=text)

    def close(self) -> None:
        """Give the GPU's memory back; the encoder can't be used any more."""
        vars(self).pop("_image", None)
        self._text = None
        torch.cuda.empty_cache()


def _bulk_rows(model: Model) -> int:
    embedding: Any = model.image_tower.backbone.get_submodule("patch_embedding")
    side = embedding.kernel_size[0]
    preprocessing = model.preprocessing
    num_patches = (preprocessing.height // side) * (preprocessing.width // side)
    return MAX_SMALL_ROWS if num_patches <= FEW_PATCHES else MAX_ROWS
