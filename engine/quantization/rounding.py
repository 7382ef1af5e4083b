"""Rounds a layer's weight to FP8 so that its output, not each weight, stays close.

Knows nothing of towers or of how the inputs were sampled.

Source: GPTQ (Frantar et al. 2022, arXiv 2210.17323), with FP8 numbers for its grid: weights are
rounded one input after the other, the strongest first, and what rounding one of them adds to the
output is taken back by those not yet rounded, as far as the inputs are correlated.
"""

import torch
from torch import Tensor

from engine.quantization.fp8 import dequantized, quantized

# Of the mean square of the inputs, added to each, so that inputs that never vary do no harm
# (the share that the paper uses).
DAMPING = 0.01
BLOCK_INPUTS = 128  # rounded before the weights beyond them are updated


def round_weight(weight: Tensor, *, scale: float, gram: Tensor) -> Tensor:
    """Round a weight to FP8 with the least expected square error of the layer's output.

    Args:
        weight: float32 [out, in].
        scale: What an FP8 number is multiplied with.
        gram: float32 [in, in], the mean of x x^T over sampled inputs x.

    Returns:
        float8_e4m3fn [out, in].
    """
    order = gram.diagonal().argsort(descending=True, stable=True)
    weight, gram = weight[:, order], gram[order][:, order]
    num_inputs = weight.shape[1]
    damped = gram + DAMPING * gram.diagonal().mean() * torch.eye(num_inputs, device=gram.device)
    # Row i holds, over its diagonal element, how the inputs after i make up for an error at i.
    factor = torch.linalg.cholesky(
        torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True
    )
    remaining = weight.clone()
    rounded = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
    for first in range(0, num_inputs, BLOCK_INPUTS):
        last = min(first + BLOCK_INPUTS, num_inputs)
        block = remaining[:, first:last]
        errors = torch.empty_like(block)
        for column in range(last - first):
            here = factor[first + column, first:last]
            rounded[:, first + column] = quantized(block[:, column], scale)
            kept = dequantized(rounded[:, first + column], scale, weight.dtype)
            errors[:, column] = (block[:, column] - kept) / here[column]
            block[:, column:] -= torch.outer(errors[:, column], here[column:])
        remaining[:, last:] -= errors @ factor[first:last, last:]
    # Bytes, since torch cannot index FP8 on every device.
    return rounded.view(torch.uint8)[:, order.argsort()].view(torch.float8_e4m3fn)
