"""Resizes and crops images of many sizes on a GPU at once, bit by bit as Pillow does.

Knows nothing of where the pixels came from: arrays of bytes in, arrays of bytes out.

Pillow resamples one axis after the other, and rounds to 8 bit in between; so do two launches of
one kernel here, each for all images of a batch. Weights are computed before, as in Pillow's
`Resample.c`: in float64, normalized, then rounded to fixed point.
"""

from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from engine.preprocess import Preprocessing, resized_size

# Pillow's codes of the filters that are here, and how far each reaches in source pixels.
_BICUBIC = 3
_SUPPORT = {2: 1.0, _BICUBIC: 2.0}
FILTERS = frozenset(_SUPPORT)
"""Pillow's codes of the filters that `resample` knows: bilinear and bicubic."""

# Of weights in fixed point: 32 bit, less 8 for a pixel and 2 for sums beyond 1.
_NUM_BITS = tl.constexpr(32 - 8 - 2)
_ONE, _HALF = tl.constexpr(1 << _NUM_BITS.value), tl.constexpr(1 << (_NUM_BITS.value - 1))
_NUM_FIELDS = tl.constexpr(15)
_BLOCK_OUT = 64
_BLOCK_ROWS, _BLOCK_LEVELS = 4, 128


@dataclass(frozen=True, kw_only=True, slots=True)
class Sources:
    """Decoded images in the GPU's memory: uint8 [height, width, 3] each, RGB, HWC."""

    addresses: NDArray[np.int64]
    """[N], of the upper left pixel."""
    size: NDArray[np.int64]
    """[N, 2], width and height in pixels."""
    step_bytes: NDArray[np.int64]
    """[N, 2], from a pixel to the next along the width, and along the height; negative where they
    lie in memory the other way round."""

    def __len__(self) -> int:
        """N."""
        return len(self.addresses)


def upright(
    addresses: NDArray[np.int64], *, size: NDArray[np.int64], orientations: NDArray[np.int64]
) -> Sources:
    """Images as they are seen, of images as they are stored; nothing is moved.

    Args:
        addresses: [N], of uint8 [height, width, 3], RGB, HWC, C-contiguous.
        size: [N, 2], width and height in pixels, as stored.
        orientations: [N], EXIF's, 1 to 8 (CIPA DC-008, section 4.6.5.1.6).
    """
    step_bytes = np.stack([np.full(len(size), 3), 3 * size[:, 0]], axis=1)
    is_from_right = np.isin(orientations, (2, 3, 7, 8))
    is_from_below = np.isin(orientations, (3, 4, 6, 7))
    is_reversed = np.stack([is_from_right, is_from_below], axis=1)
    addresses = addresses + (is_reversed * (size - 1) * step_bytes).sum(axis=1)
    step_bytes = np.where(is_reversed, -step_bytes, step_bytes)
    is_turned = (orientations >= 5)[:, None]
    return Sources(
        addresses=addresses,
        size=np.where(is_turned, size[:, ::-1], size),
        step_bytes=np.where(is_turned, step_bytes[:, ::-1], step_bytes),
    )


@triton.jit
def _weight(distance: tl.tensor, is_bicubic: tl.constexpr) -> tl.tensor:
    """Of a source pixel at this distance from the output pixel's centre, not yet normalized."""
    x = tl.abs(distance)
    if is_bicubic:  # Keys 1981, with a = -0.5
        near = (1.5 * x - 2.5) * x * x + 1.0
        far = (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
        weight = tl.where(x < 1.0, near, tl.where(x < 2.0, far, 0.0))
    else:
        weight = tl.where(x < 1.0, 1.0 - x, 0.0)
    return weight


@triton.jit
def _weights_kernel(
    jobs_ptr: tl.tensor, support: tl.constexpr, is_bicubic: tl.constexpr, block_out: tl.constexpr
) -> None:
    """Store for one axis of one image: the first source pixel of each output pixel, and weights."""
    job_ptr = jobs_ptr + tl.program_id(0) * _NUM_FIELDS
    num_out = tl.load(job_ptr + 3).to(tl.int32)
    in_size = tl.load(job_ptr + 4).to(tl.int32)
    full_size = tl.load(job_ptr + 5)  # of the whole axis after the resize; a crop keeps a part
    offset = tl.load(job_ptr + 6).to(tl.int32)
    num_taps = tl.load(job_ptr + 7).to(tl.int32)
    weights_ptr = tl.load(job_ptr + 8).to(tl.pointer_type(tl.int32))
    out = tl.program_id(1) * block_out + tl.arange(0, block_out)
    position = out + offset  # within the resized axis; beyond it a crop pads with black
    is_inside = (position >= 0) & (position < full_size)
    scale = in_size.to(tl.float64) / full_size.to(tl.float64)
    filter_scale = tl.maximum(scale, 1.0)
    reach = filter_scale * support
    inverse = 1.0 / filter_scale
    centre = (position.to(tl.float64) + 0.5) * scale
    first = tl.maximum((centre - reach + 0.5).to(tl.int32), 0)
    last = tl.minimum((centre + reach + 0.5).to(tl.int32), in_size)
    tl.store(weights_ptr + out, first, mask=out < num_out)

    total = tl.where(is_inside, 0.0, 1.0).to(tl.float64)
    for tap in range(num_taps):
        weight = _weight((first + tap - centre + 0.5) * inverse, is_bicubic)
        total += tl.where(first + tap < last, weight, 0.0)
    for tap in range(num_taps):
        pixel = first + tap
        weight = _weight((pixel - centre + 0.5) * inverse, is_bicubic) / total
        fixed = weight * _ONE
        fixed = (fixed + tl.where(fixed < 0.0, -0.5, 0.5)).to(tl.int32)
        fixed = tl.where(is_inside & (pixel < last), fixed, 0)
        tl.store(weights_ptr + (tap + 1) * num_out + out, fixed, mask=out < num_out)


@triton.jit
def _resample_kernel(
    jobs_ptr: tl.tensor, block_rows: tl.constexpr, block_levels: tl.constexpr
) -> None:
    """Resample one axis of one image: a tile of rows by levels, three of each pixel."""
    job_ptr = jobs_ptr + tl.program_id(0) * _NUM_FIELDS
    width = tl.load(job_ptr).to(tl.int32)
    height = tl.load(job_ptr + 1).to(tl.int32)
    first_row = tl.program_id(1) * block_rows
    first_level = tl.program_id(2) * block_levels
    if first_row >= height or first_level >= 3 * width:
        return
    is_height = tl.load(job_ptr + 2) > 0
    num_out = tl.load(job_ptr + 3).to(tl.int32)
    in_size = tl.load(job_ptr + 4).to(tl.int32)
    num_taps = tl.load(job_ptr + 7).to(tl.int32)
    weights_ptr = tl.load(job_ptr + 8).to(tl.pointer_type(tl.int32))
    source_ptr = tl.load(job_ptr + 9).to(tl.pointer_type(tl.uint8))
    source_column = tl.load(job_ptr + 10)
    source_row = tl.load(job_ptr + 11)
    target_ptr = tl.load(job_ptr + 12).to(tl.pointer_type(tl.uint8))
    target_column = tl.load(job_ptr + 13)
    target_row = tl.load(job_ptr + 14)

    row = (first_row + tl.arange(0, block_rows))[:, None]
    level = (first_level + tl.arange(0, block_levels))[None, :]
    column = level // 3
    is_target = (row < height) & (column < width)
    out = tl.where(is_height, row, column)
    first = tl.load(weights_ptr + out, mask=is_target, other=0)
    across = tl.where(is_height, column * source_column, row * source_row)
    pixel_ptr = source_ptr + across + level % 3
    step = tl.where(is_height, source_row, source_column)
    pixel_ptr += first * step
    weight_ptr = weights_ptr + out
    num_pixels = tl.where(is_target, in_size - first, 0)
    values = tl.full([block_rows, block_levels], _HALF, tl.int32)
    for tap in range(num_taps):
        weight_ptr += num_out
        weight = tl.load(weight_ptr, mask=is_target, other=0)
        source = tl.load(pixel_ptr, mask=tap < num_pixels, other=0)
        values += source.to(tl.int32) * weight
        pixel_ptr += step
    values = tl.minimum(tl.maximum(values >> _NUM_BITS, 0), 255)
    target = target_ptr + row * target_row + column * target_column + level % 3
    tl.store(target, values.to(tl.uint8), mask=is_target)


def resample(sources: Sources, *, preprocessing: Preprocessing, device: torch.device) -> Tensor:
    """Resize and crop images, on the current stream.

    Args:
        sources: They must stay until the stream has come so far.
        preprocessing: The output's size, and how to reach it; its filter is one of FILTERS.
        device: Where the images are.

    Returns:
        uint8 [N, height, width, 3], RGB, HWC, as `preprocess.decode_pixels` makes of such images.
    """
    output = np.array([preprocessing.width, preprocessing.height])
    shape = (len(sources), preprocessing.height, preprocessing.width, 3)
    pixels = torch.empty(shape, dtype=torch.uint8, device=device)
    if not len(sources):
        return pixels
    sizes, which = np.unique(sources.size, axis=0, return_inverse=True)
    full_sizes = [resized_size((width, height), preprocessing) for width, height in sizes.tolist()]
    axes = _Axes(
        in_size=sources.size, full_size=np.array(full_sizes)[which.reshape(-1)], output=output
    )
    first_axis = axes.first()
    between_size = np.where(np.arange(2) == first_axis[:, None], output, axes.in_size)
    between_bytes = 3 * between_size.prod(axis=1)
    between = torch.empty(int(between_bytes.sum()), dtype=torch.uint8, device=device)
    image_bytes = int(3 * output.prod())
    buffers = [
        sources,
        _contiguous(between.data_ptr() + between_bytes.cumsum() - between_bytes, between_size),
        _contiguous(
            pixels.data_ptr() + np.arange(len(sources)) * image_bytes,
            np.broadcast_to(output, between_size.shape),
        ),
    ]
    is_bicubic, support = preprocessing.resample == _BICUBIC, _SUPPORT[preprocessing.resample]
    axes_of_passes = first_axis, 1 - first_axis
    num_taps = [axes.num_taps(axis, support=support) for axis in axes_of_passes]
    # For each output pixel of an axis where its source starts, and then its weights.
    num_weights = np.stack(
        [(taps + 1) * output[axis] for taps, axis in zip(num_taps, axes_of_passes, strict=True)]
    )
    weights = torch.empty(int(num_weights.sum()), dtype=torch.int32, device=device)
    weight_ends = num_weights.cumsum().reshape(num_weights.shape)
    weight_addresses = weights.data_ptr() + weights.itemsize * (weight_ends - num_weights)
    passes = [
        axes.jobs(
            axis,
            source=source,
            target=target,
            num_taps=taps,
            weights=addresses,
        )
        for axis, source, target, taps, addresses in zip(
            axes_of_passes, buffers, buffers[1:], num_taps, weight_addresses, strict=False
        )
    ]
    jobs = torch.from_numpy(np.stack(passes)).to(device)
    _weights_kernel[2 * len(sources), triton.cdiv(int(output.max()), _BLOCK_OUT)](
        jobs,
        support=support,
        is_bicubic=is_bicubic,
        block_out=_BLOCK_OUT,
        # A fused multiplication and addition rounds once, Pillow's C twice.
        enable_fp_fusion=False,
    )
    for jobs_of_pass, target in zip(jobs, buffers[1:], strict=True):
        width, height = target.size.max(axis=0).tolist()
        _resample_kernel[
            len(sources), triton.cdiv(height, _BLOCK_ROWS), triton.cdiv(3 * width, _BLOCK_LEVELS)
        ](jobs_of_pass, block_rows=_BLOCK_ROWS, block_levels=_BLOCK_LEVELS)
    return pixels


def _contiguous(addresses: NDArray[np.int64], size: NDArray[np.int64]) -> Sources:
    ones = np.ones(len(size), dtype=np.int64)
    return upright(addresses, size=size, orientations=ones)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Axes:
    """What is to be done along both axes: 0 is the width, 1 the height."""

    in_size: NDArray[np.int64]
    """[N, 2], of the sources."""
    full_size: NDArray[np.int64]
    """[N, 2], after the resize."""
    output: NDArray[np.int64]
    """[2], of which the crop leaves the middle."""

    def first(self) -> NDArray[np.int64]:
        """The axis [N] that is resampled first, as Pillow chooses."""
        shrink = self.in_size - self.full_size
        is_height = (shrink[:, 1] > 0) & (shrink[:, 1] > 2 * shrink[:, 0])
        return is_height.astype(np.int64)

    def num_taps(self, axis: NDArray[np.int64], *, support: float) -> NDArray[np.int64]:
        """Source pixels [N] of an output pixel along `axis` [N], at most."""
        scale = np.maximum(_chosen(self.in_size, axis) / _chosen(self.full_size, axis), 1)
        return 2 * np.ceil(scale * support).astype(np.int64) + 1

    def jobs(
        self,
        axis: NDArray[np.int64],
        *,
        source: Sources,
        target: Sources,
        num_taps: NDArray[np.int64],
        weights: NDArray[np.int64],
    ) -> NDArray[np.int64]:
        """One pass, along `axis` [N]: int64 [N, fields], in the order in which kernels read."""
        in_size, full_size = _chosen(self.in_size, axis), _chosen(self.full_size, axis)
        num_out = self.output[axis]
        offset = (full_size - num_out) // 2
        fields = [*target.size.T, axis, num_out, in_size, full_size, offset, num_taps, weights]
        for images in (source, target):
            fields += [images.addresses, *images.step_bytes.T]
        return np.stack(fields, axis=1).astype(np.int64)


def _chosen(sizes: NDArray[np.int64], axis: NDArray[np.int64]) -> NDArray[np.int64]:
    """Of each row [2], the element that `axis` says."""
    chosen: NDArray[np.int64] = np.take_along_axis(sizes, axis[:, None], axis=1)[:, 0]
    return chosen
